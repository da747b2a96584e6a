"""`ep-rft train`, and what it says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from eval_protocol_rft import loop, sampling, training
from eval_protocol_rft.cli._common import say
from eval_protocol_rft.cli._flags import Takes, Unset
from eval_protocol_rft.loop import fireworks

if TYPE_CHECKING:
    from eval_protocol_rft.loop import MakeParts, TrainResult

_THE_TESTS = {"temperature": Unset("the test's"), "max_tokens": Unset("the test's")}
_PLACE = {"base_model": Unset("--model"), "deployment": None}


def train(
    evaluator: str,
    run: Annotated[dict[str, Any], Takes(loop.atrain)],
    how: Annotated[dict[str, Any], Takes(loop.LoopOptions)],
    filters: training.Filters,
    optimizer: loop.Optimizer,
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams, _THE_TESTS, list(_THE_TESTS))],
    here: Annotated[dict[str, Any], Takes(loop.LocalParts)],
    there: Annotated[dict[str, Any], Takes(fireworks.FireworksParts, _PLACE)],
    *,
    output: Annotated[Path, loop.RUN("-o")] = Path("run"),
    base_url: Annotated[str | None, loop.MODEL()] = None,
) -> None:
    r"""Train a policy on what an evaluation test scores, and watch it learn.

    Samples, scores, takes a step, gives the sampler the new weights, again. Stop it in any way: the
    same command goes on from the newest checkpoint.

    Args:
        evaluator: tests/test_x.py::test_x, an evaluation test: its data, processor and evaluator.
        output: Folder of the run.
        base_url: Sample from this server; it takes new weights as vLLM in its development mode
            does, or `ep-rft serve --reloads`.

    Examples:
      ep-rft train tests/test_math.py::test_math --model local/my-model --steps 200
      ep-rft train tests/test_math.py::test_math --max-staleness 1 --algorithm cispo --steps 200
      ep-rft train tests/test_math.py::test_math --model accounts/fireworks/models/qwen3-8b \
          --deployment my-run --lora-rank 32 --steps 100
      ep-rft train tests/test_math.py::test_math --model tiny --base-url http://localhost:8000 \
          --weights ./tiny --steps 50
    """
    if base_url is not None:
        params["api_base"] = base_url
    if how.keys().isdisjoint(("steps", "epochs")):
        how["epochs"] = 1.0
    from eval_protocol_rft.scoring.executors import load_evaluator

    options = loop.LoopOptions(**how, filters=filters)
    parts = _parts(optimizer, here, there, run.get("model"))
    try:
        result = loop.train(
            load_evaluator(evaluator).function,
            output,
            options=options,
            completion_params=params or None,
            parts=parts,
            warn=lambda text: say(f"ep-rft: {text}", err=True),
            **run,
        )
    except KeyboardInterrupt:
        same = "The same command" + (" without --overwrite" if "overwrite" in run else "")
        raise KeyboardInterrupt(f". {same} goes on in {output}") from None
    show_result(result)


def _parts(
    optimizer: loop.Optimizer, here: dict[str, Any], there: dict[str, Any], model: str | None
) -> MakeParts:
    """Where sampling and training happen."""
    on_fireworks = "deployment" in there
    for name in ("weights", "trust_remote_code"):
        if on_fireworks and name in here:
            raise loop.SetupError(
                f"{_flag(name)} is for training in this process, and --deployment is on Fireworks"
            )
    for name in ("training_shape", "delete_on_close"):
        if not on_fireworks and name in there:
            raise loop.SetupError(f"{_flag(name)} is for training on Fireworks: add --deployment")
    if on_fireworks:
        base_model = there.setdefault("base_model", model)
        if base_model is None:
            raise loop.SetupError(
                "--deployment trains on Fireworks: name the model, with --base-model"
            )
        return fireworks.FireworksParts(optimizer=optimizer, **there)
    rank = there.get("lora_rank", 0)
    lora = loop.LoraSettings(rank=rank, alpha=2 * rank) if rank else None
    return loop.LocalParts(lora=lora, optimizer=optimizer, **here)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
