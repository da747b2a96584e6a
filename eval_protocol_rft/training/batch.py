"""Rows in, `TrainingBatch` out: grouping, filters, advantages and packing in one call.

Invariant: `datums` and `dropped` account for every completion that was asked for. All token ids
of a batch come from one tokenizer. A batch is never empty: that is an `EmptyBatchError`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Unpack, cast

from eval_protocol_rft.training.algorithms import ConfigValue
from eval_protocol_rft.training.collector import Collector, target_tokens
from eval_protocol_rft.training.datums import Normalization, TrainingDatum
from eval_protocol_rft.training.errors import TrainingDataError
from eval_protocol_rft.training.filters import FilteredGroup, filter_group
from eval_protocol_rft.training.groups import GroupKey, group_rows, iter_groups
from eval_protocol_rft.training.options import BatchArguments, BatchOptions
from eval_protocol_rft.training.rows import Row
from eval_protocol_rft.training.stats import BatchStats
from eval_protocol_rft.training.trajectory import PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TrainingBatch:
    """One batch, in no trainer's types yet; `eval_protocol_rft.training.export` has those."""

    datums: list[TrainingDatum]
    """Those of one prompt group stand together."""
    algorithm: str
    loss_fn: str
    """The loss on the wire."""
    loss_fn_config: Mapping[str, ConfigValue]
    """Its thresholds, absolute."""
    normalization: Normalization
    """What the datums' weights hold. Anything but "none": the trainer must not divide again."""
    dropped: Mapping[str, int]
    """Reason (see `filters.DROP_REASONS`) -> completions that gave no datum."""
    stats: BatchStats
    tokenizer: str | None
    """Name of the tokenizer, where known."""

    def __len__(self) -> int:
        """Datums."""
        return len(self.datums)

    def __repr__(self) -> str:
        """One line; the numbers are in `stats`, the datums in `datums`."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        mean = self.stats.reward_mean
        return (
            f"TrainingBatch({self.algorithm}: {len(self.datums)} datums of "
            f"{self.stats.groups_trained} groups, {self.stats.sampled_tokens} sampled tokens, "
            f"mean reward {'unknown' if mean is None else format(mean, '.4g')}, "
            f"dropped: {dropped or 'none'})"
        )


def build_batch(
    rows: Iterable[Row] | Iterable[PromptGroup],
    *,
    key: GroupKey | None = None,
    **options: Unpack[BatchArguments],
) -> TrainingBatch:
    """One batch from all of `rows`.

    Args:
        rows: scored rows, or the prompt groups that `group_rows` made of them.
        key: names the group of a row; default experiment id and row id.
        algorithm: a name in `ALGORITHMS`: advantage estimator, loss and thresholds. Default
            "grpo".
        estimator: advantages in place of the algorithm's own, such as
            `functools.partial(advantages.grpo, ddof=0)`: [P, G] rewards in, [P, G] out. NaN goes
            in where a group is smaller than the largest; what comes out there is not read.
        components: names of evaluator metrics for an estimator of several rewards, which then
            gets [P, G, K] scores in this order (`estimator=advantages.gdpo`).
        loss_fn_config: entries that replace or join the algorithm's; thresholds are absolute.
        normalization: what the datums' weights hold, see `datums.Normalization`. The default,
            "none", is the bare loss mask: the loss is a sum over tokens, and the trainer divides,
            once. With any other choice the division is in the weights, and the trainer must be
            told not to divide.
        constant_length: L of `normalization="constant"`, usually max_tokens of the rollouts.
        filters: what is dropped and shaped. The default keeps truncated completions and drops
            groups without a gradient.
        biased_sampling: completions sampled at temperature 0 or from a truncated support (top_p,
            top_k) have biased importance ratios, and groups of which slow completions were
            cancelled (over_sample, straggler_seconds) hold too many short ones: "warn" trains on
            them, "refuse" raises. Default "warn".
        pass_threshold: the reward from which a completion counts as correct in `stats`. Default
            1.0.

    Raises:
        EmptyBatchError: nothing is left to train on.
        BiasedSamplingError: see `biased_sampling`.
        TrainingDataError: rows or options are wrong; the message names the row.
    """
    chosen = BatchOptions(**options)
    collector = Collector(chosen)
    for group in _groups(rows, functools.partial(group_rows, key=key)):
        collector.add(group, *_filter(group, chosen))
    return _finish(collector, chosen)


def iter_batches(
    rows: Iterable[Row] | Iterable[PromptGroup],
    *,
    max_groups: int | None = None,
    max_tokens: int | None = None,
    completions_per_group: int | None = None,
    key: GroupKey | None = None,
    **options: Unpack[BatchArguments],
) -> Iterator[TrainingBatch]:
    """Batches from more rows than fit in memory: holds one batch, and groups still incomplete.

    Advantages that are normalised over a batch see that batch alone. Only groups that train count
    towards a limit.

    Args:
        rows: scored rows, or prompt groups; read once, lazily.
        max_groups: most prompt groups of a batch.
        max_tokens: most targets (tokens in, prompts included) of a batch. A group is never split:
            one with more is a batch by itself.
        completions_per_group: completions per row times runs; needed where the rows of one group
            do not stand together. See `iter_groups`.
        key: names the group of a row; default experiment id and row id.
        **options: as for `build_batch`.

    Raises:
        EmptyBatchError: no group at all is left to train on.
        TrainingDataError, BiasedSamplingError: as for `build_batch`, at the batch concerned.
    """
    if max_groups is None and max_tokens is None:
        raise TrainingDataError(
            "give iter_batches max_groups, max_tokens or both; build_batch makes one batch of all"
        )
    for name, limit in (("max_groups", max_groups), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise TrainingDataError(f"{name} must be at least 1, got {limit}")
    chosen = BatchOptions(**options)
    grouping = functools.partial(iter_groups, key=key, completions_per_group=completions_per_group)
    return _batches(_groups(rows, grouping), chosen, max_groups=max_groups, max_tokens=max_tokens)


def _batches(
    groups: Iterable[PromptGroup],
    options: BatchOptions,
    *,
    max_groups: int | None,
    max_tokens: int | None,
) -> Iterator[TrainingBatch]:
    collector = Collector(options)
    for group in groups:
        left, dropped = _filter(group, options)
        # A batch closes when the next group does not fit, so what is dropped after its last group
        # is counted in it, and no batch holds dropped groups alone.
        full = max_groups is not None and len(collector) >= max_groups
        if left is not None and max_tokens is not None:
            full = full or collector.tokens + target_tokens(left) > max_tokens
        if left is not None and full and len(collector):
            yield _finish(collector, options)
            collector = Collector(options)
        collector.add(group, left, dropped)
    yield _finish(collector, options)


def _filter(group: PromptGroup, options: BatchOptions) -> tuple[FilteredGroup | None, Counter[str]]:
    return filter_group(
        group, options.filters, relative=options.relative, components=options.components
    )


def _finish(collector: Collector, options: BatchOptions) -> TrainingBatch:
    datums, stats = collector.pack()
    return TrainingBatch(
        datums=datums,
        algorithm=options.algorithm,
        loss_fn=options.loss_fn,
        loss_fn_config=options.thresholds,
        normalization=options.normalization,
        dropped=dict(collector.dropped),
        stats=stats,
        tokenizer=collector.tokenizer,
    )


def _groups(
    items: Iterable[Row] | Iterable[PromptGroup],
    group: Callable[[Iterable[Row]], Iterable[PromptGroup]],
) -> Iterator[PromptGroup]:
    """`items` themselves where they are prompt groups, else what `group` makes of the rows."""
    iterator = iter(items)
    for first in iterator:
        all_items = itertools.chain([first], iterator)
        if isinstance(first, PromptGroup):
            yield from cast("Iterator[PromptGroup]", all_items)
        else:
            yield from group(cast("Iterator[Row]", all_items))
