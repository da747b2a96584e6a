"""How tests wait: for an event, never for a time, so that they pass on a machine that is far too
busy. The patience is for what never comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE = 600.0
"""Seconds after which what was waited for is taken never to come."""


def wait_until(true: Callable[[], bool], said: Callable[[], object] = lambda: "") -> None:
    """Block until it is so; if it never is, fail with what is `said` then."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"it never came to that: {said()}"
        time.sleep(0.002)


async def until(true: Callable[[], bool]) -> None:
    """`wait_until` beside a running loop."""
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - what is waited for may happen in another thread
            await asyncio.sleep(0.002)
