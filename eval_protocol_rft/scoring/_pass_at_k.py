"""pass@k: the chance that at least one of k completions, drawn from those sampled, is correct.

Invariant: the estimate is unbiased and computed as a product of ratios, so it neither overflows
nor loses digits for large n.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


@overload
def pass_at_k(num_completions: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(
    num_completions: ArrayLike, num_correct: ArrayLike, k: ArrayLike
) -> NDArray[np.float64]: ...
def pass_at_k(
    num_completions: ArrayLike, num_correct: ArrayLike, k: ArrayLike
) -> NDArray[np.float64] | float:
    """Unbiased estimate of pass@k: 1 - C(n - c, k) / C(n, k).

    Equation 1 of Chen et al. 2021, "Evaluating Large Language Models Trained on Code"
    (arXiv:2107.03374), with n completions sampled for a problem, c of them correct.

    Args:
        num_completions: n, integers of any shape that broadcasts with the others.
        num_correct: c, between 0 and n.
        k: completions drawn without replacement, between 1 and n.

    Returns:
        The estimate, in [0, 1], in the broadcast shape; a float where all three are scalars.

    Raises:
        ValueError: a value is not an integer, c is outside [0, n] or k outside [1, n]; the message
            names the first such place.
    """
    n, c, ks = np.broadcast_arrays(
        _integers("num_completions", num_completions),
        _integers("num_correct", num_correct),
        _integers("k", k),
    )
    _refuse("num_correct must lie between 0 and num_completions", (c < 0) | (c > n), n, c, ks)
    _refuse("k must lie between 1 and num_completions", (ks < 1) | (ks > n), n, c, ks)
    drawn = np.arange(ks.max(initial=0))
    wrong_left = np.maximum(n[..., None] - c[..., None] - drawn, 0)
    # Past the k-th draw n - j may be 0 or less; those factors are replaced by 1 anyway.
    left = np.maximum(n[..., None] - drawn, 1)
    all_wrong = np.where(drawn < ks[..., None], wrong_left / left, 1.0).prod(axis=-1)
    estimate: NDArray[np.float64] = 1.0 - all_wrong
    return float(estimate) if estimate.ndim == 0 else estimate


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _refuse(
    rule: str,
    broken: NDArray[np.bool_],
    n: NDArray[np.int64],
    c: NDArray[np.int64],
    k: NDArray[np.int64],
) -> None:
    if not broken.any():
        return
    place = tuple(int(i) for i in np.argwhere(broken)[0])
    where = f" at {list(place)}" if place else ""
    raise ValueError(
        f"{rule}{where}: num_completions={n[place]}, num_correct={c[place]}, k={k[place]}"
    )
