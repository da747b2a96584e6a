"""`ep-rft plan`: what a run will take, before it is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from eval_protocol_rft import data, loop, sampling
from eval_protocol_rft import report as room
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import Input, fail, rollout_file, say, say_json
from eval_protocol_rft.cli._flags import Takes, Unset

if TYPE_CHECKING:
    from eval_protocol_rft.loop import Measured

_SAMPLED = {"model": Unset("the test's"), "temperature": Unset("the test's")}
_SAMPLED |= {"max_tokens": Unset("the test's")}


def plan(
    source: Input,
    size: loop.RunSize,
    rates: loop.Rates,
    dry: Annotated[dict[str, Any], Takes(loop.dry_run)],
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams, _SAMPLED, list(_SAMPLED))],
    *,
    base_url: Annotated[str | None, Flag(panel="The dry run", unset="the test's")] = None,
    json: bool = False,
) -> None:
    r"""Say what a run will take before it is paid for: completions, tokens, hours, dollars, each
    with its arithmetic.

    Completions are measured in a dry run: a few rows of an evaluation test, sampled and scored for
    real, here or on a server; or in rollouts, or a training run, that are there. Prices and
    throughputs are yours to say: what lacks one is left out, and named.

    Args:
        source: tests/test_x.py::test_x for a dry run; or rollouts, or the folder of a training run.
        base_url: Sample from this server.
        json: Print JSON instead.

    Examples:
      ep-rft plan examples/arithmetic/test_arithmetic.py::test_arithmetic \
        --model local/arithmetic --rows 1000 --epochs 2 -n 8
      ep-rft plan tests/test_math.py::test_math --base-url http://localhost:8000 \
        --model Qwen/Qwen3-8B --steps 200 -n 16 \
        --tokens-per-second 9000 --seconds-per-step 40 --setup-minutes 20 \
        --gpu-price 4 --sampling-gpus 2 --training-gpus 8
      ep-rft plan rollouts.parquet --steps 200 --price-in 0.2 --price-out 0.2
      ep-rft plan run --steps 500 --tokens-per-second 9000
    """
    measured = _measured(source, dry, params, base_url, size.n)
    made = loop.plan(measured, size, rates)
    if json:
        import msgspec

        say_json(msgspec.json.format(msgspec.json.encode(made), indent=2))
        return
    for line in _measured_lines(measured):
        say(line)
    say("")
    for row in made.lines:
        note = f"   ({row.note})" if row.note else ""
        say(f"{row.name}: {row.arithmetic} = {_shown(row)}{note}")
    if made.left_out:
        say("")
        say("left out:")
        for name, lacking in made.left_out.items():
            say(f"  {name}: needs {', '.join(lacking)}")


def _measured(
    source: Input,
    dry: dict[str, Any],
    params: dict[str, Any],
    base_url: str | None,
    n: int | None,
) -> Measured:
    if "::" in str(source):
        if base_url is not None:
            params["api_base"] = base_url
        if n is not None:
            params["n"] = n
        from eval_protocol_rft.scoring.executors import load_evaluator

        return loop.dry_run(
            load_evaluator(str(source)).function,
            completion_params=params or None,
            source=str(source),
            **dry,
        )
    for name in (*params, *(dry.keys() - {"progress"}), *(["base_url"] if base_url else [])):
        flag = "--" + name.replace("_", "-")
        fail(
            f"{flag} is of a dry run, and {source} is a file: name an evaluation test (file::test)"
        )
    if isinstance(source, Path) and room.is_run_folder(source):
        return loop.measure_run(room.read_run(source)[0], source=str(source))
    with rollout_file(source, progress=dry["progress"]) as file:
        groups = data.RolloutDataset(file).prompt_groups()
        return loop.measure_groups(groups, source=data.shown(source))


def _measured_lines(measured: Measured) -> list[str]:
    lines = [
        f"{measured.source}: {measured.completions:,} completions of {measured.prompts:,} prompts"
        + (f", {measured.failed:,} more failed" if measured.failed else "")
        + (f", {measured.truncated:,} cut off" if measured.truncated else "")
    ]
    if measured.seconds is not None:
        tokens = measured.completions * measured.tokens_out.mean
        lines.append(
            f"it took {measured.seconds:.1f} s where it ran, start included "
            f"({tokens / measured.seconds:,.0f} sampled tokens/s); the plan does not use this"
        )
    if measured.step_seconds is not None:
        lines.append(
            f"the trainer took {measured.step_seconds:.2f} s a step where it ran; the plan does "
            "not use this"
        )
    return lines


def _shown(line: Any) -> str:
    if line.unit == "USD":
        return f"{line.value:,.2f} USD"
    if line.unit in ("h", "s"):
        return f"{line.value:,.2f} {line.unit}"
    return f"{line.value:,.0f}{f' {line.unit}' if line.unit else ''}"
