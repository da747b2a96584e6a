"""`ep-rft generate` and `ep-rft score`: jobs that cost something, with what they say at their end.

Invariant: however one is stopped, what is stored is kept, and the user is told how to go on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eval_protocol_rft import data as room
from eval_protocol_rft import episodes, rollout, sampling
from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import Input, fail, rollout_file, say
from eval_protocol_rft.cli._flags import Takes

if TYPE_CHECKING:
    from eval_protocol_rft.data import GenerateSummary, ScoreSummary

_SUFFIXES = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
_SHOWN_REASONS = 5


def generate(
    data: Annotated[list[Input], Flag(metavar="DATA...")],
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, {"n": 1})],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    retry: sampling.RetryPolicy,
    prices: Annotated[dict[str, Any], Takes(sampling.Prices, {"prompt": None, "completion": None})],
    options: Annotated[dict[str, Any], Takes(room.agenerate)],
    limits: Annotated[dict[str, Any], Takes(episodes.EpisodeLimits)],
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
        data: Parquet, JSONL, JSON, CSV or TSV, text also as .gz, .zst or .bz2: files, folders,
            patterns, URLs (s3://, hf://, https://...); or a folder saved by `datasets`.
        output: A .parquet or .jsonl file.
        format: What the output's name must say.
        verbose: Latencies, retries and requests in flight at the end.

    Examples:
      ep-rft generate problems.jsonl -o rollouts.parquet -n 8 \
        --model local/arithmetic
      ep-rft generate train.parquet -o rollouts.parquet -n 16 \
        --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B
      ep-rft generate math.jsonl -o rollouts.parquet -n 8 --prompt-key problem \
        --model Qwen/Qwen3-8B --base-url http://localhost:8000 \
        --where "level >= 3"
      ep-rft generate easy.jsonl.gz 'shards/*.jsonl' -o rollouts.parquet \
        --model local/arithmetic
      ep-rft generate starts.jsonl -o episodes.parquet -n 8 \
        --model local/arithmetic --max-turns 8 \
        --episodes examples/frozen_lake/test_frozen_lake.py::FrozenLake
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
            limits=limits or None,
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
    _show_generated(summary, verbose=verbose)
    if summary.failed == summary.total:
        raise typer.Exit(1)


def _show_generated(summary: GenerateSummary, *, verbose: bool) -> None:
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


def score(
    rollouts: Input,
    options: Annotated[dict[str, Any], Takes(room.score)],
    *,
    evaluator: Annotated[str, Flag("-e")],
    allow_unscored: bool = False,
) -> None:
    r"""Grade every completion of a file with your own evaluator.

    A grader that hangs, raises or dies costs its completion, which is then unscored, not 0. Stop it
    in any way: the same command goes on with what is not graded yet.

    Args:
        rollouts: A rollout file; or what a test wrote, or a URL (then with -o).
        evaluator: tests/test_x.py::test_x (an evaluation test or a plain function of `row`), or
            package.module:function.
        allow_unscored: Exit with 0 though no completion has a reward.

    Examples:
      ep-rft score rollouts.parquet -e tests/test_math.py::test_math
      ep-rft score rollouts.parquet \
        -e my_package.rewards:short_answer --name short
      ep-rft score rollouts.parquet -e judge.py::judge --concurrency 16 \
        -o judged.parquet
    """
    with rollout_file(rollouts) as source:
        if str(source) != room.one_place(rollouts).name and "output" not in options:
            name = room.shown(rollouts)
            fail(f"{name} is only read, and stays as it is: name another file with -o")
        try:
            summary = room.score(source, evaluator, **options)
        except KeyboardInterrupt:
            what = "The same command goes on with what is not graded"
            raise KeyboardInterrupt(f". {what}") from None
    _show_scored(summary)
    if not summary.scored and not allow_unscored:
        fail("no completion has a reward (--allow-unscored if that is right)")


def _show_scored(summary: ScoreSummary) -> None:
    mean = "" if summary.mean is None else f", mean {summary.mean:.4f}"
    say(
        f"{summary.output}: {summary.scored} of {summary.completions} completions of "
        f"{summary.rows} rows have {summary.column}{mean} ({summary.graded} graded by this run)"
    )
    if summary.failed:
        say(f"{summary.failed} could not be sampled, so there is nothing to grade")
    _show_reasons(summary.unscored, "unscored")
    _show_reasons(summary.remarks, "scored, but")
    for warning in summary.warnings:
        say(f"ep-rft: warning: {warning}", err=True)


def _show_reasons(reasons: Counter[str], what: str) -> None:
    if reasons:
        say(f"{reasons.total()} {what}:", err=True)
        for reason, count in reasons.most_common(_SHOWN_REASONS):
            say(f"  {count} x {reason}", err=True)
