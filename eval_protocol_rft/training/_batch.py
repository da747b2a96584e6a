"""Rows in, `TrainingBatch` out: grouping, filters, advantages and packing in one call; and what a
batch was made from, in numbers.

Invariant: `datums` and `dropped` account for every completion that was asked for. All token ids
of a batch come from one tokenizer. A batch is never empty: that is an `EmptyBatchError`.

What was read, kept and dropped is counted in `Collector` and nowhere else, so one batch's numbers
always add up. Rewards, truncation and pass@k describe everything that was sampled and scored,
before filters and shaping, so that they do not flatter; token counts describe what is trained on.
An episode of several turns counts once, however many datums it gives.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft import _statistics as statistics
from eval_protocol_rft.training._algorithms import BatchArguments, BatchOptions, ConfigValue
from eval_protocol_rft.training._datums import Normalization, TrainingDatum, pack, target_count
from eval_protocol_rft.training._prompt_groups import GroupKey, Row, group_rows, iter_groups
from eval_protocol_rft.training._types import (
    BiasedSamplingWarning,
    EmptyBatchError,
    PromptGroup,
    TrainingDataError,
    Trajectory,
    several_models,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """Statistics of one batch. Means over nothing are None, never 0."""

    groups: int
    """Prompt groups read, dropped ones included."""
    groups_trained: int
    completions: int
    """Completions sampled, unscored ones included."""
    scored: int
    datums: int
    """One per completion that trains; of an episode, one per segment."""
    group_sizes: Mapping[int, int]
    """Completions of a group that train -> groups with that many, of those with any."""
    reward_mean: float | None
    reward_std: float | None
    """Population deviation (ddof 0) over completions."""
    reward_min: float | None
    reward_max: float | None
    truncated: int
    """Completions sampled that were cut off at max_tokens."""
    sampled_tokens: int
    """Targets trained on, those with a weight."""
    context_tokens: int
    """The datums' other targets: prompts and what else was not sampled."""
    pass_at_k: Mapping[int, float]
    """k -> mean over the groups with at least k scored completions, for k = 1, 2, 4, ..."""
    all_correct: int
    """Groups whose scored completions are all correct."""
    none_correct: int
    """Groups with scored completions, none of them correct."""
    policy_versions: Mapping[str | None, int]
    """Version -> completions it sampled; None where unknown."""


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


class Collector:
    """The groups of one batch in the making."""

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._kept: list[PromptGroup] = []
        self._cut_off: list[PromptGroup] = []
        self._named: PromptGroup | None = None
        self._dropped: Counter[str] = Counter()
        self._rewards: list[NDArray[np.float64]] = []
        """[scored] of each group that was read, before shaping."""
        self._sampled = self._truncated = 0
        self._versions: Counter[str | None] = Counter()
        self.tokens = 0
        """Targets of the datums so far."""

    def __len__(self) -> int:
        """Groups that train so far."""
        return len(self._kept)

    def filtered(self, group: PromptGroup) -> tuple[PromptGroup | None, Counter[str]]:
        """What the filters leave of a group, and what they drop."""
        return self._options.filtered(group)

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
        rewards = group.rewards
        if "baselines" in self._options.estimator_inputs:  # greedy ones are no samples
            rewards = rewards[[not trajectory.greedy for trajectory in group.trajectories]]
        self._rewards.append(rewards[~np.isnan(rewards)])
        self._sampled += len(group)
        self._truncated += sum(t.truncated for t in group.trajectories)
        self._versions.update(t.policy_version for t in group.trajectories)
        self._dropped += dropped
        if left is not None:
            self._kept.append(left)
            if group.cut_off:
                self._cut_off.append(group)
            self.tokens += target_tokens(left)

    def batch(self) -> TrainingBatch:
        """Advantages over all groups, then datums.

        Raises:
            EmptyBatchError: no group is left.
            TrainingDataError: the caller refuses biased sampling, and there is some.
            TrainingDataError: the estimator cannot work with these groups.
        """
        if not self._kept:
            if self._dropped["no_baseline"]:
                raise TrainingDataError(
                    "no prompt has a greedy completion with a reward, which the estimator compares "
                    "with (remax): roll each row out once more with temperature 0 and n=1, and "
                    "pass both rows with key=, which names the group of a row"
                )
            raise EmptyBatchError(self._dropped)
        options = self._options
        rows = self._advantages().tolist()  # padded where a group is smaller than the largest
        trained = [
            (trajectory, advantage, p)
            for p, kept in enumerate(self._kept)
            for trajectory, advantage in zip(kept.trajectories, rows[p], strict=False)
            if trajectory.trains
        ]
        trajectories, advantages, groups = map(list, zip(*trained, strict=True))
        for bias in self._biases(trajectories):
            if options.biased_sampling == "refuse":
                raise TrainingDataError(bias)
            # The caller of build_batch, or of next() on the iterator.
            warnings.warn(bias, BiasedSamplingWarning, stacklevel=3)
        return TrainingBatch(
            datums=pack(
                trajectories,
                advantages,
                groups,
                normalization=options.normalization,
                constant_length=options.constant_length,
                components=options.components,
            ),
            algorithm=options.algorithm,
            loss_fn=options.loss_fn,
            loss_fn_config=options.thresholds,
            normalization=options.normalization,
            dropped=dict(self._dropped),
            stats=self._stats(trajectories, groups),
            tokenizer=self._named.tokenizer if self._named else None,
        )

    def _stats(self, trained: Sequence[Trajectory], trained_of: Sequence[int]) -> BatchStats:
        """Of all that was read, and of the [S] sequences trained on; `trained_of`: [S] the number
        of the group of each."""
        sampled_tokens = sum(trajectory.total_sampled for trajectory in trained)
        rewards = np.concatenate(self._rewards)
        counts = statistics.count_passes(self._rewards, self._options.pass_threshold)
        outcomes = statistics.count_outcomes(*counts)
        ks = statistics.powers_of_two(counts[0].max(initial=0))
        trained_of_group = Counter(trained_of)
        return BatchStats(
            groups=len(self._rewards),
            groups_trained=len(trained_of_group),
            completions=self._sampled,
            scored=len(rewards),
            datums=sum(len(trajectory.segments) for trajectory in trained),
            group_sizes=dict(sorted(Counter(trained_of_group.values()).items())),
            reward_mean=float(rewards.mean()) if len(rewards) else None,
            reward_std=float(rewards.std()) if len(rewards) else None,
            reward_min=float(rewards.min()) if len(rewards) else None,
            reward_max=float(rewards.max()) if len(rewards) else None,
            truncated=self._truncated,
            sampled_tokens=sampled_tokens,
            context_tokens=sum(map(target_count, trained)) - sampled_tokens,
            pass_at_k={p.k: p.value for p in statistics.mean_pass_at_k(*counts, ks)},
            all_correct=outcomes["all"],
            none_correct=outcomes["none"],
            policy_versions=dict(self._versions),
        )

    def _advantages(self) -> NDArray[np.float64]:
        """[P, G] for the largest G; NaN went in beyond the end of a smaller group."""
        rewards = self._scores()
        given = self._options.advantage(rewards, **self._inputs(rewards.shape[:2]))
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
                    f"the estimator gave {advantages[p, g]} to {kept.trajectories[g].name}"
                    f", with rewards {kept.rewards.tolist()} in its group"
                )
        return advantages

    def _inputs(self, shape: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
        """What the estimator wants besides scores."""
        inputs = {}
        for name in self._options.estimator_inputs:
            if name == "baselines":
                inputs[name] = np.array([kept.baseline for kept in self._kept], np.float64)
                continue
            inputs[name] = np.full(shape, np.nan)
            for p, kept in enumerate(self._kept):
                inputs[name][p, : len(kept)] = [t.total_sampled for t in kept.trajectories]
        return inputs

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

    def _biases(self, trajectories: list[Trajectory]) -> Iterator[str]:
        """Why what was sampled is no fair draw from the policy, each reason once."""
        if problem := several_models(Counter(t.model for t in trajectories if t.model)):
            yield problem
        if biased := [t for t in trajectories if t.bias is not None]:
            yield (
                f"{len(biased)} of {len(trajectories)} completions have biased importance ratios; "
                f"the first is {biased[0].name}: {biased[0].bias}. Sample with temperature > 0, "
                "top_p=1 and top_k=0"
            )
        if self._cut_off:
            first = self._cut_off[0]
            yield (
                f"in {len(self._cut_off)} of {len(self._kept)} groups slow completions were "
                f"cancelled, which favours short ones; the first is group {first.key!r}, with "
                f"{first.cut_off} cancelled and {len(first)} kept. Sample without over_sample and "
                "straggler_seconds"
            )


def target_tokens(left: PromptGroup) -> int:
    """Targets of the datums that a group will give."""
    return sum(map(target_count, (t for t in left.trajectories if t.trains)))


def build_batch(
    rows: Iterable[Row] | Iterable[PromptGroup],
    *,
    key: GroupKey | None = None,
    tokenizer: Any = None,
    **options: Unpack[BatchArguments],
) -> TrainingBatch:
    """One batch from all of `rows`.

    Args:
        rows: scored rows, or the prompt groups that `group_rows` made of them.
        key: names the group of a row; default experiment id, row id and model.
        tokenizer: folder, hub id or tokenizer of the model, for rows that Eval Protocol's remote
            processors brought back: what was sampled is compared with what the agent got. Default:
            what a row's completion_params name; see `rollout.read_remote_rows`.
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
            top_k) have biased importance ratios, groups of which slow completions were cancelled
            (over_sample, straggler_seconds) hold too many short ones, and of several models all
            but one are another policy's: "warn" trains on them, "refuse" raises. Default "warn".
        pass_threshold: the reward from which a completion counts as correct in `stats`. Default
            1.0.

    Raises:
        EmptyBatchError: nothing is left to train on.
        TrainingDataError: see `biased_sampling`.
        TrainingDataError: rows or options are wrong; the message names the row.
    """
    collector = Collector(BatchOptions(**options))
    for group in _groups(rows, functools.partial(group_rows, key=key, tokenizer=tokenizer)):
        collector.add(group, *collector.filtered(group))
    return collector.batch()


def iter_batches(
    rows: Iterable[Row] | Iterable[PromptGroup],
    *,
    max_groups: int | None = None,
    max_tokens: int | None = None,
    completions_per_group: int | None = None,
    key: GroupKey | None = None,
    tokenizer: Any = None,
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
        key: names the group of a row; default experiment id, row id and model.
        tokenizer: as for `build_batch`.
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
    grouping = functools.partial(
        iter_groups, key=key, tokenizer=tokenizer, completions_per_group=completions_per_group
    )
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
        left, dropped = collector.filtered(group)
        # A batch closes when the next group does not fit, so what is dropped after its last group
        # is counted in it, and no batch holds dropped groups alone.
        full = max_groups is not None and len(collector) >= max_groups
        if left is not None and max_tokens is not None:
            full = full or collector.tokens + target_tokens(left) > max_tokens
        if left is not None and full and len(collector):
            yield collector.batch()
            collector = Collector(options)
        collector.add(group, left, dropped)
    yield collector.batch()


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
