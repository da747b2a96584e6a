"""What `ep-rft train` does with its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.cli._common import fail, say

if TYPE_CHECKING:
    from eval_protocol_rft.loop import MakeParts, TrainResult


def run_training(
    evaluator: str,
    output: Path,
    *,
    options: dict[str, Any],
    truncated: Any,
    optimizer: dict[str, Any],
    completion_params: dict[str, Any],
    place: dict[str, Any],
    arguments: dict[str, Any],
) -> TrainResult:
    """Train, and turn what goes wrong into one line and exit code 1."""
    from eval_protocol_rft.loop import (
        LoopOptions,
        NothingToTrainOnError,
        TrainerError,
        TrainingStoppedError,
        train,
    )
    from eval_protocol_rft.sampling import RunStoppedError, SamplingError
    from eval_protocol_rft.scoring import EvaluatorError
    from eval_protocol_rft.scoring.executors import load_evaluator
    from eval_protocol_rft.training import Filters, MissingPackageError

    given = {key: value for key, value in completion_params.items() if value is not None}
    try:
        return train(
            load_evaluator(evaluator).function,
            output,
            options=LoopOptions(**options, filters=Filters(truncated=truncated)),
            completion_params=given or None,
            parts=_parts(optimizer, **place),
            warn=lambda text: say(f"ep-rft: {text}", err=True),
            **arguments,
        )
    except (
        ValueError,
        EvaluatorError,
        MissingPackageError,
        NothingToTrainOnError,
        RunStoppedError,
        SamplingError,
        TrainerError,
        TrainingStoppedError,
    ) as error:
        fail(str(error))


def _parts(
    optimizer: dict[str, Any],
    *,
    deployment: str | None,
    base_model: str | None,
    training_shape: str | None,
    delete_on_close: bool,
    weights: Path | None,
    lora_rank: int,
    trust_remote_code: bool,
) -> MakeParts:
    from eval_protocol_rft.loop import LoraSettings, Optimizer, SetupError, local_parts

    fireworks = {
        "--training-shape": training_shape,
        "--delete-on-close": delete_on_close,
    }
    here = {"--weights": weights, "--trust-remote-code": trust_remote_code}
    for name, value in (fireworks if deployment is None else here).items():
        if value:
            raise SetupError(
                f"{name} is for training on Fireworks: add --deployment"
                if deployment is None
                else f"{name} is for training in this process, and --deployment is on Fireworks"
            )
    if deployment is None:
        return local_parts(
            weights=weights,
            lora=LoraSettings(rank=lora_rank, alpha=2 * lora_rank) if lora_rank else None,
            optimizer=Optimizer(**optimizer),
            trust_remote_code=trust_remote_code,
        )
    from eval_protocol_rft.loop.fireworks import fireworks_parts

    if base_model is None:
        raise SetupError("--deployment trains on Fireworks: name the model, with --base-model")
    return fireworks_parts(
        base_model=base_model,
        deployment=deployment,
        lora_rank=lora_rank,
        optimizer=Optimizer(**optimizer),
        training_shape=training_shape,
        delete_on_close=delete_on_close,
    )


_SCORES = {"sampled": "sampled_score", "greedy": "greedy_score"}


def _shown(score: float | None) -> str:
    return "not scored" if score is None else f"{score:.3f}"


def show_result(result: TrainResult) -> None:
    """What came of it, in a few lines."""
    evaluations = result.evaluations
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        for name, key in _SCORES.items():
            if key in first or key in last:
                before, after = (_shown(line.get(key)) for line in (first, last))
                say(f"held out, {name}: {before} -> {after}")
        if not any(key in line for line in (first, last) for key in _SCORES.values()):
            say("held out: nothing was scored")
    made = [result.folder / name for name in ("report.html", "model")]
    files = ", ".join(str(path) for path in made if path.exists())
    say(f"{len(result.steps)} steps: {files}")
