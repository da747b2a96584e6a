"""What is waited for on the service, and what is left there.

Invariant: whoever waits is told what for, in the service's own words, and since when; whoever stops
is told what runs on, costs money, and how to delete it. What is there at the first look was not
waited for, and nothing is told of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from eval_protocol_rft.data import OnWait, Waiting
from eval_protocol_rft.sampling import FireworksAddress

logger = logging.getLogger(__name__)


class Wait:
    """One thing that is waited for.

    Args:
        what: for people: "trainer job my-run-trainer".
        on_wait: told at each look; changes are logged as well.
    """

    def __init__(self, what: str, on_wait: OnWait | None) -> None:
        self._what = what
        self._on_wait = on_wait
        self._began = time.monotonic()
        self._state: str | None = None

    def see(self, state: str) -> None:
        """It is not there yet."""
        if state != self._state:
            logger.info("waiting for %s: %s", self._what, state)
        self._state = state
        self._tell(state, done=False)

    def done(self, state: str) -> None:
        """It is there."""
        if self._state is None:
            return
        self._state = None
        self._tell(state, done=True)

    def _tell(self, state: str, *, done: bool) -> None:
        if self._on_wait is not None:
            seconds = time.monotonic() - self._began
            self._on_wait(Waiting(what=self._what, state=state, seconds=seconds, done=done))


def deletion(name: str, address: FireworksAddress) -> str:
    """Where a DELETE deletes the resource; a deployment also where it was used just now."""
    checks = "?ignoreChecks=true" if "/deployments/" in name else ""
    return f"{address.url}/v1/{name}{checks}"


def left_running(names: Sequence[str], address: FireworksAddress) -> str:
    """What to tell of resources that go on without us: their names, and how to delete them."""
    kinds = [name.split("/")[2].removesuffix("s") for name in names]
    ids = [name.rpartition("/")[2] for name in names]
    words = {"rlorTrainerJob": "trainer job", "dataset": "data set"}
    listed = ", ".join(f"{words.get(k, k)} {i}" for k, i in zip(kinds, ids, strict=True))
    deletes = "\n".join(
        '  curl -X DELETE -H "Authorization: Bearer $FIREWORKS_API_KEY" '
        f"'{deletion(name, address)}'"
        for name in names
    )
    here = urlsplit(address.url).hostname in ("127.0.0.1", "localhost", "::1")
    cost = "" if here else " They cost money while they are there."
    return f"left running at {address.url}: {listed}.{cost} To delete them:\n{deletes}"
