"""What one step, and one evaluation, tell of themselves: one line of `metrics.jsonl` each.

Invariant: everything outside `seconds` follows from settings, data and seed. A number that does
not exist (a mean over nothing) is left out, never 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval_protocol_rft.loop.trainer import ForwardBackward
from eval_protocol_rft.pass_at_k import pass_at_k
from eval_protocol_rft.training.batch import TrainingBatch
from eval_protocol_rft.training.trajectory import PromptGroup

Line = dict[str, Any]


def step_line(
    step: int,
    batch: TrainingBatch,
    *,
    groups: Sequence[PromptGroup],
    first: ForwardBackward,
    last: ForwardBackward,
    optimizer: Mapping[str, float],
    staleness: Sequence[int],
    mismatch: Mapping[str, float],
) -> Line:
    """The line of one step.

    Args:
        step: from 1 on; also the policy version that it leads to.
        batch: what was trained on.
        groups: all groups that came in for it, dropped ones included.
        first, last: the first and the last pass over the batch.
        optimizer: what the last optimiser step told.
        staleness: versions behind, per group that trained.
        mismatch: sampler against trainer, see `mismatch`.
    """
    stats = batch.stats
    lengths = [t.total_sampled for group in groups for t in group.trajectories]
    ratios = np.exp(
        np.concatenate(
            [
                np.asarray(values, np.float64)[datum.mask] - datum.logprobs[datum.mask]
                for datum, values in zip(batch.datums, first.logprobs, strict=True)
            ]
        ).clip(max=20.0)
    )
    line: Line = {
        "kind": "step",
        "step": step,
        "reward_mean": stats.reward_mean,
        "reward_std": stats.reward_std,
        "pass_at_k": {str(k): value for k, value in stats.pass_at_k.items()},
        "groups": stats.groups,
        "groups_trained": stats.groups_trained,
        "all_correct": stats.all_correct,
        "none_correct": stats.none_correct,
        "completions": stats.completions,
        "datums": stats.datums,
        "dropped": dict(sorted(batch.dropped.items())),
        "sampled_tokens": stats.sampled_tokens,
        "completion_tokens_mean": float(np.mean(lengths)) if lengths else None,
        "truncated": stats.truncated,
        "scores": component_means(groups),
        "staleness": {str(k): n for k, n in sorted(Counter(staleness).items())},
        "staleness_max": max(staleness),
        **_renamed(first.metrics),
        # Kish's, of all tokens at once: that of parts does not fold.
        "effective_sample_fraction": float(ratios.mean() ** 2 / np.mean(ratios**2)),
        **optimizer,
        **mismatch,
    }
    if last is not first and "clip_fraction:mean" in last.metrics:
        line["clip_fraction"] = last.metrics["clip_fraction:mean"]
    return {name: value for name, value in line.items() if value is not None}


def eval_line(
    step: int,
    greedy: Sequence[PromptGroup],
    sampled: Sequence[PromptGroup],
    *,
    pass_threshold: float,
) -> Line:
    """The line of one evaluation: mean scores, and pass@k by Chen et al.'s unbiased estimator."""
    line: Line = {"kind": "eval", "step": step, "rows": len(greedy) or len(sampled)}
    scores = [t.reward for g in greedy for t in g.trajectories if t.reward is not None]
    if scores:
        line["greedy_score"] = float(np.mean(scores))
    scored = [g.rewards[~np.isnan(g.rewards)] for g in sampled]
    scored = [rewards for rewards in scored if len(rewards)]
    if scored:
        line["sampled_score"] = float(np.mean([rewards.mean() for rewards in scored]))
        counts = np.array([len(rewards) for rewards in scored])
        correct = np.array([np.sum(rewards >= pass_threshold) for rewards in scored])
        line["pass_at_k"] = {
            str(k): float(np.mean(pass_at_k(counts, correct, k))) for k in _powers(counts.min())
        }
    every = [*greedy, *sampled]
    line["unscored"] = sum(
        len(g.failures) + len(g.failed_rows) + sum(t.reward is None for t in g.trajectories)
        for g in every
    )
    scores_beside = component_means(sampled)
    if scores_beside:
        line["scores"] = scores_beside
    tokens = [t.total_sampled for g in sampled for t in g.trajectories]
    if tokens:
        line["completion_tokens_mean"] = float(np.mean(tokens))
    return line


def component_means(groups: Sequence[PromptGroup]) -> dict[str, float] | None:
    """Mean of each metric of the evaluator's over the completions that have it; None without any.
    One that is not valid (`is_score_valid`) is in no mean."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for trajectory in group.trajectories:
            for name, score in trajectory.components.items():
                if score is not None:
                    found[name].append(score)
    return {name: float(np.mean(found[name])) for name in sorted(found)} or None


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(int(most).bit_length())]


_NAMES = {
    "policy_loss:sum": "policy_loss",
    "kl_loss:sum": "kl_loss",
    "ratio:mean": "ratio_mean",
    "ratio:max": "ratio_max",
    "clip_fraction:mean": "clip_fraction",
    "entropy:mean": "entropy",
    "sampler_entropy:mean": "sampler_entropy",
    "effective_sample_fraction:mean": "effective_sample_fraction",
    "sampler_kl_k1:mean": "sampler_kl_k1",
    "sampler_kl_k3:mean": "sampler_kl_k3",
    "reference_kl_k3:mean": "reference_kl",
    "server_loss_difference:max": "server_loss_difference",
}


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    return {new: metrics[old] for old, new in _NAMES.items() if old in metrics}
