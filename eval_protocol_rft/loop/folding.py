"""One set of metrics from those of several passes.

Invariant: what a name's reduction says is what is done: `name:sum` adds up, `name:max` and
`name:min` keep the extreme, and `name:mean` is weighted by `tokens:sum`, over which the means are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TOKENS = "tokens:sum"


def fold_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Fold `parts`; a metric that only some have is folded over those.

    Raises:
        ValueError: a name has no reduction, or an unknown one.
    """
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _fold(name, [part for part in parts if name in part]) for name in names}


def _fold(name: str, parts: Sequence[Mapping[str, float]]) -> float:
    values = [part[name] for part in parts]
    match name.rpartition(":")[2]:
        case "sum":
            return sum(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "mean":
            weights = [part.get(TOKENS, 1.0) for part in parts]
            total = sum(weights)
            if not total:
                return sum(values) / len(values)
            return sum(v * w for v, w in zip(values, weights, strict=True)) / total
    raise ValueError(f"the metric {name!r} has no reduction: name it {name}:sum, :mean, :max, :min")
