"""Rows in, `TrainingBatch` out: grouping, filters, advantages and packing in one call.

Invariant: `datums` and `dropped` account for every completion that was asked for. All token ids
of a batch come from one tokenizer. A batch is never empty: that is an `EmptyBatchError`.

Groups come in one by one, filtered; a batch's datums come out.

Invariant: what was read, kept and dropped is counted here and nowhere else, so one batch's
numbers always add up.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Unpack, cast

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.training._algorithms import BatchArguments, BatchOptions, ConfigValue
from eval_protocol_rft.training._datums import Normalization, TrainingDatum, pack, target_count
from eval_protocol_rft.training._errors import (
    BiasedSamplingWarning,
    EmptyBatchError,
    TrainingDataError,
)
from eval_protocol_rft.training._filters import filter_group
from eval_protocol_rft.training._groups import GroupKey, group_rows, iter_groups
from eval_protocol_rft.training._rows import Row
from eval_protocol_rft.training._stats import BatchStats, GroupStats, batch_stats
from eval_protocol_rft.training._trajectory import PromptGroup, Trajectory


class Collector:
    """The groups of one batch in the making."""

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._kept: list[PromptGroup] = []
        self._seen: list[GroupStats] = []
        self._cut_off: list[PromptGroup] = []
        self._named: PromptGroup | None = None
        self.dropped: Counter[str] = Counter()
        """Completions without a datum so far, by reason."""
        self.tokens = 0
        """Targets of the datums so far."""

    def __len__(self) -> int:
        """Groups that train so far."""
        return len(self._kept)

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer of all groups so far, where known."""
        return self._named.tokenizer if self._named else None

    def add(self, group: PromptGroup, left: PromptGroup | None, dropped: Counter[str]) -> None:
        """Take in a group and what the filters left of it.

        Raises:
            TrainingDataError: its tokenizer is not that of the groups before it.
        """
        if group.tokenizer is not None:
            if self._named is not None and self._named.tokenizer != group.tokenizer:
                raise TrainingDataError(
                    f"group {self._named.key!r} was tokenized with {self._named.tokenizer!r}, "
                    f"group {group.key!r} with {group.tokenizer!r}: one batch holds token ids of "
                    "one tokenizer"
                )
            self._named = self._named or group
        self._seen.append(GroupStats.of(group))
        self.dropped += dropped
        if left is not None:
            self._kept.append(left)
            if group.cut_off:
                self._cut_off.append(group)
            self.tokens += target_tokens(left)

    def pack(self) -> tuple[list[TrainingDatum], BatchStats]:
        """Advantages over all groups, then datums.

        Raises:
            EmptyBatchError: no group is left.
            TrainingDataError: the caller refuses biased sampling, and there is some.
            TrainingDataError: the estimator cannot work with these groups.
        """
        if not self._kept:
            raise EmptyBatchError(self.dropped)
        options = self._options
        rows = self._advantages().tolist()  # padded where a group is smaller than the largest
        trained = [
            (trajectory, advantage, p)
            for p, kept in enumerate(self._kept)
            for trajectory, advantage in zip(kept.trajectories, rows[p], strict=False)
            if trajectory.trains
        ]
        trajectories, advantages, groups = map(list, zip(*trained, strict=True))
        self._check_bias(trajectories)
        self._check_cut_off()
        datums = pack(
            trajectories,
            advantages,
            groups,
            normalization=options.normalization,
            constant_length=options.constant_length,
            components=options.components,
        )
        threshold = options.pass_threshold
        return datums, batch_stats(self._seen, trajectories, groups, pass_threshold=threshold)

    def _advantages(self) -> NDArray[np.float64]:
        """[P, G] for the largest G; NaN went in beyond the end of a smaller group."""
        rewards = self._scores()
        given = self._options.advantage(rewards)
        advantages = np.asarray(given, dtype=np.float64)
        if advantages.shape != rewards.shape[:2]:
            raise TrainingDataError(
                f"the estimator returned advantages of shape {advantages.shape} for rewards of "
                f"shape {rewards.shape}; it must keep [P, G]"
            )
        for p, kept in enumerate(self._kept):
            finite = np.isfinite(advantages[p, : len(kept)])
            if not finite.all():
                g = int(finite.argmin())
                raise TrainingDataError(
                    f"the estimator gave {advantages[p, g]} to {_name(kept.trajectories[g])}"
                    f", with rewards {kept.rewards.tolist()} in its group"
                )
        return advantages

    def _scores(self) -> NDArray[np.float64]:
        """[P, G] rewards or [P, G, K] components."""
        names = self._options.components
        largest = max(map(len, self._kept))
        scores = np.full((len(self._kept), largest, max(len(names), 1)), np.nan)
        for p, kept in enumerate(self._kept):
            values = kept.components(names) if names else kept.rewards[:, None]
            scores[p, : len(values)] = values
        if not names:
            return scores[:, :, 0]
        for k, name in enumerate(names):
            if np.isnan(scores[:, :, k]).all():
                raise TrainingDataError(
                    f"no completion has the component {name!r}: the evaluator must return a "
                    "metric of that name, with a score"
                )
        return scores

    def _check_bias(self, trajectories: list[Trajectory]) -> None:
        biased = [t for t in trajectories if t.bias is not None]
        if not biased:
            return
        first = biased[0]
        self._tell_bias(
            f"{len(biased)} of {len(trajectories)} completions have biased importance ratios; the "
            f"first is {_name(first)}: {first.bias}. Sample with temperature > 0, top_p=1 and "
            "top_k=0"
        )

    def _check_cut_off(self) -> None:
        if not self._cut_off:
            return
        first = self._cut_off[0]
        self._tell_bias(
            f"in {len(self._cut_off)} of {len(self._kept)} groups slow completions were cancelled, "
            f"which favours short ones; the first is group {first.key!r}, with {first.cut_off} "
            f"cancelled and {len(first)} kept. Sample without over_sample and straggler_seconds"
        )

    def _tell_bias(self, message: str) -> None:
        if self._options.biased_sampling == "refuse":
            raise TrainingDataError(message)
        # The caller of build_batch, or of next() on the iterator.
        warnings.warn(message, BiasedSamplingWarning, stacklevel=6)


def target_tokens(left: PromptGroup) -> int:
    """Targets of the datums that a group will give."""
    return sum(map(target_count, (t for t in left.trajectories if t.trains)))


def _name(trajectory: Trajectory) -> str:
    return f"row {trajectory.row_id!r}, completion {trajectory.completion}"


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
    """Reason (see `DROP_REASONS`) -> completions that gave no datum."""
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
        normalization: what the datums' weights hold, see `Normalization`. The default,
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
        TrainingDataError: see `biased_sampling`.
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
        TrainingDataError: as for `build_batch`, at the batch concerned.
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


def _filter(group: PromptGroup, options: BatchOptions) -> tuple[PromptGroup | None, Counter[str]]:
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
