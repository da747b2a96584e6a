"""Which completions a job has, and which it still misses.

Invariant: one byte per completion asked for, whatever the completions hold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MISSING, _DONE, _FAILED = 0, 1, 2


class DoneIndex:
    """The state of every (data_idx, sample_idx).

    Args:
        num_rows: of the data set.
        n: completions per row.
    """

    def __init__(self, num_rows: int, n: int) -> None:
        self._states = np.zeros((num_rows, n), np.uint8)

    def add(
        self, data_idx: NDArray[np.int64], sample_idx: NDArray[np.int64], failed: NDArray[np.int64]
    ) -> None:
        """Take up rows that are stored; later ones count."""
        self._states[data_idx, sample_idx] = np.where(failed, _FAILED, _DONE)

    def missing(self, data_idx: int, *, retry_failed: bool) -> list[int]:
        """The `sample_idx` that are to be sampled."""
        states = self._states[data_idx]
        wanted = states != _DONE if retry_failed else states == _MISSING
        return [int(i) for i in np.flatnonzero(wanted)]

    @property
    def done(self) -> int:
        """Completions that are there."""
        return int(np.count_nonzero(self._states == _DONE))

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(self._states == _FAILED))
