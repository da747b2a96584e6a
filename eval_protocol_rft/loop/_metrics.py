"""What one step, and one evaluation, tell of themselves: one line of `metrics.jsonl` each. Where
lines go besides: TensorBoard, Weights & Biases.

Invariant: everything outside `seconds` follows from settings, data and seed. A number that does
not exist (a mean over nothing) is left out, never 0. A sink is told each line of a run once, in
order, and never decides anything; a run that is continued goes on in the same sink, and steps that
are done again are not there twice. Metrics of several passes are reduced as their names say:
`name:sum` adds up, `name:max` and `name:min` keep the extreme, and `name:mean` is weighted by
`tokens:sum`, over which the means are.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft._statistics import count_passes, mean_pass_at_k, powers_of_two
from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.loop._trainer import ForwardBackward
from eval_protocol_rft.training import PromptGroup, TrainingBatch

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
        # Kish's, of all tokens at once: parts of it cannot be reduced to it.
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
        counts, correct = count_passes(scored, pass_threshold)
        ks = powers_of_two(counts.min())
        line["pass_at_k"] = {str(p.k): p.value for p in mean_pass_at_k(counts, correct, ks)}
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
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for trajectory in group.trajectories:
            for name, score in trajectory.components.items():
                if score is not None:
                    scores[name].append(score)
    return {name: float(np.mean(scores[name])) for name in sorted(scores)} or None


TOKENS = "tokens:sum"


def reduce_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduce `parts` to one; a metric that only some have is reduced over those.

    Raises:
        ValueError: a name has no reduction, or an unknown one.
    """
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _reduce(name, [part for part in parts if name in part]) for name in names}


def _reduce(name: str, parts: Sequence[Mapping[str, float]]) -> float:
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
    "correction:mean": "correction",
    "correction_bounded:mean": "correction_bounded",
    "server_loss_difference:max": "server_loss_difference",
}


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    return {new: metrics[old] for old, new in _NAMES.items() if old in metrics}


PACKAGES = {"tensorboard": ("tensorboard", "torch"), "wandb": ("wandb",)}
"""What each sink needs, by its name."""
_GROUPS = {"step": "train", "eval": "eval"}


class MetricSink(Protocol):
    """Takes a run's metrics."""

    def write(self, line: Line) -> None:
        """Take one line of `metrics.jsonl`."""

    def close(self) -> None:
        """Nothing more comes."""


def require_sinks(names: Sequence[str]) -> None:
    """Check that these sinks can be opened.

    Raises:
        SetupError: one is unknown, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise SetupError(f"no logger {name!r}: choose from {', '.join(PACKAGES)}")
        missing = [p for p in PACKAGES[name] if importlib.util.find_spec(p) is None]
        if missing:
            raise SetupError(
                f"logging to {name} needs a package that is not here: pip install "
                f"{' '.join(missing)}"
            )


def open_sinks(
    names: Sequence[str], folder: Path, *, settings: Mapping[str, Any], lines: Sequence[Line]
) -> list[MetricSink]:
    """Open sinks for a run, each once, new or where it left off.

    Args:
        names: `tensorboard`, `wandb`.
        folder: the run's.
        settings: of the run, for those that show them.
        lines: the metrics so far that the run goes on from. A sink that is new gets them first.

    Raises:
        SetupError: see `require_sinks`; or a service did not take the run.
    """
    require_sinks(names)
    opened: list[MetricSink] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            opened.append(TensorBoardSink(folder, lines=lines))
        else:
            opened.append(WandbSink(folder, settings=settings, lines=lines))
    return opened


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line by names with slashes: `train/reward_mean`, `eval/pass_at_k/4`."""
    group = _GROUPS.get(line["kind"], str(line["kind"]))
    values: dict[str, float] = {}
    for name, value in line.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, Mapping):
            inner = ((f"{group}/{name}/{key}", v) for key, v in value.items())
            values.update((key, float(v)) for key, v in inner if _is_number(v))
        elif _is_number(value):
            values[f"{group}/{name}"] = float(value)
    return values


class TensorBoardSink:
    """Scalars in RUN/tensorboard, for `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, *, lines: Sequence[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        is_new = not any(path.glob("events.out.tfevents.*"))
        following = max((line["step"] for line in lines), default=-1) + 1
        # Told to TensorBoard, so that it forgets steps that are done again.
        purge = None if is_new else following
        self._writer = SummaryWriter(str(path), purge_step=purge)
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run in Weights & Biases, whose id and last steps are kept in RUN/wandb.json.

    Project, entity and mode are those of its own settings (`WANDB_PROJECT`, `WANDB_MODE=offline`).
    What it was told once cannot be taken back: of steps that are done again it keeps the first
    values.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        self._path = folder / "wandb.json"
        is_new = not self._path.is_file()
        kept = {} if is_new else json.loads(self._path.read_text())
        self._id: str = kept.get("id") or secrets.token_hex(4)
        self._logged: dict[str, int] = kept.get("told", {})
        """Newest step of each kind of line."""
        try:
            self._run: Any = wandb.init(
                id=self._id,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(settings),
                resume="never" if is_new else "allow",
            )
        except wandb.Error as error:
            raise SetupError(f"Weights & Biases did not take the run: {error}") from error
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        kind, step = line["kind"], line["step"]
        if step <= self._logged.get(kind, -1):
            return
        self._run.log(scalars(line), step=step)
        self._logged[kind] = step
        write_whole(self._path, json.dumps({"id": self._id, "told": self._logged}).encode() + b"\n")

    def close(self) -> None:
        self._run.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
