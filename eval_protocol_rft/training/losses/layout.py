"""How datums lie in one batch of token ids, and where their targets' logits come out.

Invariant: every sampled target has exactly one place, whose logits follow the very tokens that
stand before it in its datum. Shapes: D datums, B rows of W columns, M sampled targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.training.datums import TrainingDatum

SHARED_WIDTH = 1024
"""Most columns of a row whose datums share their prompt: attention costs the square of it."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """One batch as arrays."""

    input_ids: Ints
    """[B, W] padded on the right."""
    attended: NDArray[np.bool_]
    """[B, W] False on padding; or [B, 1, W, W] what each column sees, where prompts are shared."""
    positions: Ints | None
    """[B, W] position of each token in its own datum; None where columns are positions."""
    rows: Ints
    """[M] of the logits that predict each sampled target, datum by datum."""
    columns: Ints
    targets: Ints
    """[M] ids."""

    @property
    def first_column(self) -> int:
        """No logits are needed before it."""
        return int(self.columns.min()) if len(self.columns) else 0


def side_by_side(datums: Sequence[TrainingDatum]) -> Layout:
    """A row for each datum."""
    width = max(map(len, datums))
    input_ids = np.zeros((len(datums), width), np.int64)
    attended = np.zeros((len(datums), width), np.bool_)
    for row, datum in enumerate(datums):
        input_ids[row, : len(datum)] = datum.input_tokens
        attended[row, : len(datum)] = True
    columns = [np.flatnonzero(datum.mask) for datum in datums]
    return Layout(
        input_ids=input_ids,
        attended=attended,
        positions=None,
        rows=np.repeat(np.arange(len(datums)), [len(own) for own in columns]),
        columns=np.concatenate(columns),
        targets=_targets(datums),
    )


def sharing_prompts(bundles: Sequence[Sequence[TrainingDatum]]) -> Layout:
    """A row for each bundle: its prompt once, then what follows it in each of its datums, which
    sees the prompt and itself.

    Args:
        bundles: datums with the same prompt each, see `bundled`.
    """
    rows = [_Row(bundle) for bundle in bundles]
    width = max(row.width for row in rows)
    shape = (len(rows), width)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : row.width] = row.input_ids
        positions[i, : row.width] = row.positions
        segments[i, : row.width] = row.segments
    query, key = segments[:, :, None], segments[:, None, :]
    attended = ((key == 0) | (key == query)) & (positions[:, None, :] <= positions[:, :, None])
    # Padding is seen by nobody, and sees itself: a softmax over nothing would be NaN.
    attended &= key >= 0
    attended |= np.eye(width, dtype=np.bool_)
    datums = [datum for bundle in bundles for datum in bundle]
    return Layout(
        input_ids=input_ids,
        attended=attended[:, None],
        positions=positions,
        rows=np.repeat(np.arange(len(rows)), [len(row.columns) for row in rows]),
        columns=np.concatenate([row.columns for row in rows]),
        targets=_targets(datums),
    )


def bundled(datums: Sequence[TrainingDatum]) -> list[list[int]]:
    """Places of neighbours with the same prompt, as many as fit into `SHARED_WIDTH` columns."""
    bundles: list[list[int]] = []
    width = 0
    for place, datum in enumerate(datums):
        own = len(datum) - datum.prompt_length
        previous = datums[bundles[-1][0]] if bundles else None
        if previous is not None and width + own <= SHARED_WIDTH and _same_prompt(previous, datum):
            bundles[-1].append(place)
            width += own
        else:
            bundles.append([place])
            width = len(datum)
    return bundles


class _Row:
    """One bundle: segment 0 is the prompt, segment i what follows in datum i."""

    def __init__(self, bundle: Sequence[TrainingDatum]) -> None:
        prompt = bundle[0].prompt_length
        tails = [datum.input_tokens[prompt:] for datum in bundle]
        self.input_ids = np.concatenate([bundle[0].input_tokens[:prompt], *tails])
        self.width = len(self.input_ids)
        lengths = [len(tail) for tail in tails]
        starts = prompt + np.cumsum([0, *lengths[:-1]])
        self.positions = np.concatenate(
            [np.arange(prompt), *(np.arange(prompt, prompt + length) for length in lengths)]
        )
        self.segments = np.repeat(np.arange(len(bundle) + 1), [prompt, *lengths])
        self.columns = np.concatenate(
            [
                # The target after the prompt is predicted by the prompt's own last token.
                np.where(own < prompt, own, own - prompt + start)
                for own, start in zip(
                    (np.flatnonzero(datum.mask) for datum in bundle), starts, strict=True
                )
            ]
        )


def _same_prompt(one: TrainingDatum, other: TrainingDatum) -> bool:
    length = one.prompt_length
    return length == other.prompt_length and np.array_equal(
        one.input_tokens[:length], other.input_tokens[:length]
    )


def _targets(datums: Sequence[TrainingDatum]) -> Ints:
    return np.concatenate([datum.target_tokens[datum.mask] for datum in datums])
