"""`ep-rft generate`, and what it says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eval_protocol_rft import data as room
from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import fail, say
from eval_protocol_rft.cli._flags import Takes

if TYPE_CHECKING:
    from eval_protocol_rft.data import GenerateSummary

_SUFFIXES = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}


def show(summary: GenerateSummary, *, verbose: bool) -> None:
    """Tell what was sampled, what it cost, and what failed. `verbose`: what became of the attempts
    too."""
    run = summary.run
    there = summary.total - run.completions - run.failed
    say(
        f"{summary.output}: {summary.prompts} prompts, {summary.total} completions"
        + (f", {summary.failed} of them failed" if summary.failed else "")
    )
    if run.completions or run.failed:
        rate = run.tokens / summary.seconds if summary.seconds else 0.0
        say(
            f"this run: {run.completions} sampled, {run.tokens} tokens, {rate:.0f} tokens/s, "
            f"{run.truncated} truncated, {run.attempts} requests"
            + (f"; {there} were there" if there else "")
        )
    else:
        say("nothing to do: all of them were there")
    cost = summary.attempts.cost
    if verbose:
        for line in summary.attempts.lines():
            say(line)
    elif cost is not None and (run.completions or run.failed):
        say(f"cost: {cost}")
    if run.failures:
        kinds = ", ".join(f"{count} {kind}" for kind, count in run.failures.most_common())
        say(f"failed: {kinds}; the first, {run.first_failure}", err=True)
    if summary.may_succeed:
        say("the same command with --retry-failed tries the failed ones again", err=True)


def generate(
    data: Annotated[list[Path], Flag(metavar="DATA...")],
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, {"n": 1})],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    retry: sampling.RetryPolicy,
    prices: Annotated[dict[str, Any], Takes(sampling.Prices, {"prompt": None, "completion": None})],
    options: Annotated[dict[str, Any], Takes(room.agenerate)],
    *,
    output: Annotated[Path, Flag("-o")],
    format: Annotated[  # noqa: A002
        Literal["parquet", "jsonl"] | None, Flag(panel="Run", unset="by the output's name")
    ] = None,
    verbose: Annotated[bool, Flag(panel="Run")] = False,
) -> None:
    r"""Sample n completions for every row of a data set, with exact tokens and logprobs.

    Interrupt it in any way: what was finished is on disk, and the same command goes on with what is
    missing.

    Args:
        data: Parquet, JSONL, JSON, CSV or TSV, text also as .gz or .zst: files, folders, patterns;
            or a folder saved by `datasets`.
        output: A .parquet or .jsonl file.
        format: What the output's name must say.
        verbose: Latencies, retries and requests in flight at the end.

    Examples:
      ep-rft generate problems.jsonl -o rollouts.parquet -n 8 --model local/arithmetic
      ep-rft generate train.parquet -o rollouts.parquet -n 16 \
        --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B
      ep-rft generate math.jsonl -o rollouts.parquet -n 8 --prompt-key problem \
        --model Qwen/Qwen3-8B --base-url http://localhost:8000 --where "level >= 3"
      ep-rft generate easy.jsonl.gz 'shards/*.jsonl' -o rollouts.parquet --model local/arithmetic
    """
    if format is not None and output.suffix not in _SUFFIXES[format]:
        fail(f"--format {format} and the output's name {output.name!r} contradict each other")
    if len(prices) == 1:
        fail("--price-in and --price-out go together: half of a cost would pass for all of it")
    if "extra" in params:
        params["extra_body"] = params.pop("extra")
    try:
        summary = room.generate(
            data,
            output,
            {**params, **request, **server},
            retry=retry,
            prices=sampling.Prices(**prices) if prices else None,
            **options,
        )
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        safe = "What was stored is safe: make room, and run the same command"
        fail(f"{output}: {error.strerror}. {safe}")
    except KeyboardInterrupt:
        folder = room.parts_folder(output)
        where_it_is = f" What was finished is in {folder}." if folder.exists() else ""
        raise KeyboardInterrupt(f".{where_it_is} The same command goes on") from None
    show(summary, verbose=verbose)
    if summary.failed == summary.total:
        raise typer.Exit(1)
