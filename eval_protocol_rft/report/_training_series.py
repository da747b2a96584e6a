"""A run's metrics as series over its steps. Pure.

Invariant: what was not measured is NaN, here and in everything made from it; never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Lines of one kind (`step` or `eval`), one per step, in order."""

    lines: list[Mapping[str, Any]]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], kind: str) -> Measured:
        """Those of `kind`; where a step is told of twice, the later line counts."""
        by_step = {line["step"]: line for line in lines if line.get("kind") == kind}
        return cls([by_step[step] for step in sorted(by_step)])

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    def values(self, *path: str) -> FloatArray:
        """[len(steps)] of what lies at `path` in each line."""
        return np.array([_number(line, path) for line in self.lines], np.float64)

    def share(self, part: str, whole: str) -> FloatArray:
        """[len(steps)] of `part` in `whole`; NaN where there is nothing to have a share of."""
        above, below = self.values(part), self.values(whole)
        return _divided(above, below)

    def counts(self, name: str) -> dict[str, FloatArray]:
        """Counts by key, for lines that hold them in a mapping; largest total first.

        A mapping without a key counted none of it: that is a 0. A line without the mapping is NaN.
        """
        keys = {key for line in self.lines for key in line.get(name) or {}}
        found = {
            key: np.array(
                [
                    math.nan if line.get(name) is None else float(line[name].get(key, 0))
                    for line in self.lines
                ],
                np.float64,
            )
            for key in keys
        }
        return dict(sorted(found.items(), key=lambda item: (-np.nansum(item[1]), item[0])))

    def keys(self, name: str) -> list[str]:
        """Keys of a mapping in the lines; numbers in their order."""
        keys = {key for line in self.lines for key in line.get(name) or {}}
        return sorted(
            keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
        )


def smoothed(values: FloatArray, window: int) -> FloatArray:
    """[N] means over `window` values (an odd number) around each one, fewer at the ends.

    A value that is missing is in no mean, and stays missing.
    """
    known = ~np.isnan(values)
    kernel = np.ones(window)
    half = window // 2
    sums = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(known.astype(np.float64), kernel)[half : half + len(values)]
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan)


def smoothing_window(steps: int) -> int:
    """An odd number near a twentieth of the run, at least 5."""
    return max(5, round(steps / 20) // 2 * 2 + 1)


def binned(values: FloatArray, size: int) -> FloatArray:
    """[ceil(N / size)] means of `size` neighbours each, over those that are not missing."""
    padded = np.full(math.ceil(len(values) / size) * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, size)
    counts = np.sum(~np.isnan(rows), axis=1)
    sums = np.nansum(rows, axis=1)
    return _divided(sums, counts)


def _divided(above: NDArray[Any], below: NDArray[Any]) -> FloatArray:
    """NaN where there is nothing to divide by."""
    found = np.full(above.shape, np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


def _number(line: Mapping[str, Any], path: tuple[str, ...]) -> float:
    value: Any = line
    for key in path:
        if not isinstance(value, Mapping):
            return math.nan
        value = value.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)
