"""A command that is told to end, by Ctrl-C or by whoever runs the machine.

Invariant: SIGTERM ends a command as Ctrl-C does, so what it was about to store is stored.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Stopped:
    """Why a `KeyboardInterrupt` came."""

    by: signal.Signals = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that this signal ended."""
        return 128 + self.by


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[Stopped]:
    """Within, SIGTERM does what Ctrl-C does; the value tells them apart."""
    stopped = Stopped()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stopped.by = signal.SIGTERM
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # So it is in a script's background job, which Ctrl-C is not meant for.
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
