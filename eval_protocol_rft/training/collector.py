"""Groups come in one by one, filtered; a batch's datums come out.

Invariant: what was read, kept and dropped is counted here and nowhere else, so one batch's
numbers always add up.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.training.datums import Example, TrainingDatum, pack, target_count
from eval_protocol_rft.training.errors import (
    BiasedSamplingError,
    BiasedSamplingWarning,
    EmptyBatchError,
    TrainingDataError,
)
from eval_protocol_rft.training.filters import FilteredGroup
from eval_protocol_rft.training.options import BatchOptions
from eval_protocol_rft.training.stats import BatchStats, GroupStats, batch_stats
from eval_protocol_rft.training.trajectory import NO_COMPONENTS, PromptGroup, Trajectory


class Collector:
    """The groups of one batch in the making."""

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._kept: list[FilteredGroup] = []
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

    def add(self, group: PromptGroup, left: FilteredGroup | None, dropped: Counter[str]) -> None:
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
            BiasedSamplingError: the caller refuses biased sampling, and there is some.
            TrainingDataError: the estimator cannot work with these groups.
        """
        if not self._kept:
            raise EmptyBatchError(self.dropped)
        options = self._options
        advantages = self._advantages().tolist()
        examples = [
            Example(
                trajectory,
                advantage,
                reward,
                p,
                {name: trajectory.components.get(name) for name in options.components}
                if options.components
                else NO_COMPONENTS,
            )
            for p, kept in enumerate(self._kept)
            for trajectory, advantage, reward, trains in zip(
                kept.group.trajectories,
                advantages[p],  # padded
                kept.rewards.tolist(),
                kept.trains,
                strict=False,
            )
            if trains
        ]
        self._check_bias([example.trajectory for example in examples])
        self._check_cut_off()
        datums = pack(
            examples,
            normalization=options.normalization,
            constant_length=options.constant_length,
        )
        stats = batch_stats(self._seen, examples, pass_threshold=options.pass_threshold)
        return datums, stats

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
            finite = np.isfinite(advantages[p, : len(kept.group)])
            if not finite.all():
                g = int(finite.argmin())
                raise TrainingDataError(
                    f"the estimator gave {advantages[p, g]} to {_name(kept.group.trajectories[g])}"
                    f", with rewards {kept.rewards.tolist()} in its group"
                )
        return advantages

    def _scores(self) -> NDArray[np.float64]:
        """[P, G] rewards or [P, G, K] components."""
        names = self._options.components
        largest = max(len(kept.group) for kept in self._kept)
        scores = np.full((len(self._kept), largest, max(len(names), 1)), np.nan)
        for p, kept in enumerate(self._kept):
            own = kept.group.components(names) if names else kept.rewards[:, None]
            scores[p, : len(own)] = own
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
            raise BiasedSamplingError(message)
        # The caller of build_batch, or of next() on the iterator.
        warnings.warn(message, BiasedSamplingWarning, stacklevel=6)


def target_tokens(left: FilteredGroup) -> int:
    """Targets of the datums that a group will give."""
    pairs = zip(left.group.trajectories, left.trains, strict=True)
    return sum(target_count(trajectory) for trajectory, trains in pairs if trains)


def _name(trajectory: Trajectory) -> str:
    return f"row {trajectory.row_id!r}, completion {trajectory.completion}"
