"""Hypothesis measures each example against a deadline; on a shared machine that says nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None, max_examples=50)
settings.load_profile("no_deadline")
