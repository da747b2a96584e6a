"""Commands that write a file of rollouts. `ep-rft generate` and `ep-rft score` cost something, and
say at their end what it was; `filter`, `convert`, `datums` make another file of what is there, and
tell what did not come along.

Invariant: however one is stopped, what is stored is kept, and the user is told how to go on.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from annotated_types import Ge, Le

from eval_protocol_rft import data as room
from eval_protocol_rft import episodes, rollout, sampling, training
from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import Input, check_placement, fail, rollout_file, say
from eval_protocol_rft.cli._flags import Takes, Unset
from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.engine import VllmOptions

if TYPE_CHECKING:
    from eval_protocol_rft.data import GenerateSummary, ScoreSummary

_SUFFIXES = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
_SHOWN_REASONS = 5
_N = Unset("1; where a job is there, as it has")


def generate(
    data: Annotated[list[Input], Flag(metavar="DATA...")],
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, {"n": _N})],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    retry: sampling.RetryPolicy,
    prices: Annotated[dict[str, Any], Takes(sampling.Prices, {"prompt": None, "completion": None})],
    options: Annotated[dict[str, Any], Takes(room.agenerate)],
    limits: Annotated[dict[str, Any], Takes(episodes.EpisodeLimits)],
    placement: Placement,
    vllm: VllmOptions,
    *,
    output: Annotated[Path, Flag("-o")],
    format: Annotated[  # noqa: A002
        Literal["parquet", "jsonl"] | None, Flag(panel="Run", unset="by the output's name")
    ] = None,
    min_success: Annotated[
        float | None, Ge(0), Le(1), Flag(panel="Run", unset="fail only where all failed")
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
        min_success: Share of the completions asked for, over all runs; exit with 1 below it.
        verbose: Latencies, retries and requests in flight at the end.

    Examples:
      ep-rft generate problems.jsonl -o rollouts.parquet -n 8 \
        --model local/arithmetic
      ep-rft generate train.parquet -o rollouts.parquet -n 16 \
        --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B
      ep-rft generate math.jsonl -o rollouts.parquet -n 8 --prompt-key problem \
        --model Qwen/Qwen3-8B --base-url http://localhost:8000 \
        --where "level >= 3"
      ep-rft generate math.jsonl -o rollouts.parquet -n 8 --prompt-key problem \
        --model vllm/Qwen/Qwen3-8B
      ep-rft generate easy.jsonl.gz 'shards/*.jsonl' -o rollouts.parquet \
        --model local/arithmetic
      ep-rft generate prompts.parquet -o rollouts.parquet -n 8 --raw \
        --model local/Qwen/Qwen3-8B-Base --stop "Question:"
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
    check_placement(
        placement, here=params["model"].startswith(("local/", "vllm/")), there="the server"
    )
    try:
        summary = room.generate(
            data,
            output,
            {**params, **request, **server},
            retry=retry,
            prices=sampling.Prices(**prices) if prices else None,
            limits=limits or None,
            placement=placement,
            say=lambda text: say(f"ep-rft: {text}", err=True),
            vllm=vllm,
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
    there = summary.total - summary.failed
    if min_success is not None and there < min_success * summary.total:
        fail(f"{there} of {summary.total} completions are there: less than --min-success asks for")


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
        evaluator: tests/test_x.py::test_x (an evaluation test, a plain function of `row`, or a
            reward function of Eval Protocol, verl or TRL), or package.module:function.
        allow_unscored: Exit with 0 though no completion has a reward.

    Examples:
      ep-rft score rollouts.parquet -e tests/test_math.py::test_math
      ep-rft score rollouts.parquet \
        -e my_package.rewards:short_answer --name short
      ep-rft score rollouts.parquet -e judge.py::judge --concurrency 16 \
        -o judged.parquet
      ep-rft score rollouts.parquet -e eval_protocol.rewards.math:math_reward
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


def filter(  # noqa: A001
    file: Input,
    rules: room.FilterRules,
    options: Annotated[dict[str, Any], Takes(room.filter_rollouts)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    r"""Keep the completions, or prompts, that are worth it.

    Options apply in the order below, whatever order they are given in.
    Those on prompts (pass rate, percentile, variance) see all scored completions,
    also those that options on completions then drop. What lacks a number that an
    option asks for is dropped: an unscored completion has no reward, which is not 0.

    Args:
        file: Rollout file, or what a test wrote; also a URL.
        output: Where to: .parquet or .jsonl.

    Examples:
      ep-rft filter in.parquet -o out.parquet --pass-rate 0.1:0.9 --drop-truncated
      ep-rft filter in.parquet -o middle.jsonl --reward-percentile 25:75
      ep-rft filter in.parquet -o prompts.jsonl --prompts --pass-rate :0.9
      ep-rft filter in.parquet -o out.parquet \
        --where "response not like '%sorry%'"
    """
    with rollout_file(file, progress=options["progress"]) as source:
        summary = room.filter_rollouts(source, output, rules, **options)
    if not summary.finished:
        text = "its job is not finished; this is of what is stored so far"
        say(f"ep-rft: {source}: {text}", err=True)
    say(
        f"kept {summary.kept} of {summary.completions} completions, {summary.groups_kept} of "
        f"{summary.groups} prompts"
    )
    if summary.mean_band is not None:
        say(f"those percentiles are the mean rewards {summary.mean_band}")
    for reason, count in summary.dropped.items():
        say(f"dropped {count:>8}  {reason}: {room.REASONS[reason]}")
    prompts = options.get("prompts")
    what = f"{summary.groups_kept} prompts" if prompts else f"{summary.kept} completions"
    say(f"{output}: {what}")


def buckets(
    file: Input,
    rules: room.BucketRules,
    options: Annotated[dict[str, Any], Takes(room.bucket_rollouts)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    r"""Say how hard each prompt is: a column of bands, or a file for each band.

    A prompt's band is that of its pass rate, or of the percentile of its mean reward,
    over all its scored completions. A prompt without a reward is in none.

    Args:
        file: Scored rollout file, or what a test wrote; also a URL.
        output: Where to: .parquet or .jsonl; with --split OUTPUT-easy.parquet and so on.

    Examples:
      ep-rft buckets rollouts.parquet -o rollouts_by_difficulty.parquet
      ep-rft buckets rollouts.parquet -o train.jsonl --prompts --only medium
      ep-rft buckets rollouts.parquet -o train.parquet --by percentile --split
      ep-rft buckets rollouts.parquet -o train.parquet --split \
        --names unsolved,hard,easy,solved --edges 0.001,0.5,1
    """
    with rollout_file(file, progress=options["progress"]) as source:
        summary = room.bucket_rollouts(source, output, rules, **options)
    if not summary.finished:
        text = "its job is not finished; this is of what is stored so far"
        say(f"ep-rft: {source}: {text}", err=True)
    what = "pass rate" if rules.by == "pass-rate" else "mean reward"
    width = max(len(bucket.name) for bucket in summary.buckets)
    for bucket in summary.buckets:
        line = f"{bucket.name:<{width}}  {bucket.prompts} prompts, {bucket.completions} completions"
        if bucket.low is not None:
            line += f", {what} {bucket.low:.4g} to {bucket.high:.4g}"
        say(line + (f": {bucket.path}" if bucket.path is not None else ""))
    if summary.unscored:
        say(f"{summary.unscored} prompts without a reward are in none of them")


def convert(
    source: Annotated[Input, Flag(metavar="IN")],
    target: Annotated[Path, Flag(metavar="OUT")],
    rules: room.ExampleRules,
    options: Annotated[dict[str, Any], Takes(room.convert)],
) -> None:
    r"""Convert rollouts: our Parquet or JSON lines, rows of Eval Protocol, files for verl and TRL.

    What OUT has no place for is listed. Text is never made into tokens: files of verl and TRL can
    be converted back only where `ep-rft convert` wrote them as Parquet.

    Of scored rollouts, --to sft, dpo, kto and reward choose examples for TRL's trainers: the best
    completions of a prompt, pairs of them, or those beyond thresholds.

    Args:
        source: File to convert, or its URL.
        target: File to write: .parquet, .jsonl or .json.

    Examples:
      ep-rft convert rollouts.parquet rollouts.jsonl
      ep-rft convert rollouts.parquet rows.jsonl --to ep
      ep-rft convert results/run.jsonl rollouts.parquet --drop-failed-rows
      ep-rft convert rollouts.parquet train.parquet --to verl \
        --data-source openai/gsm8k
      ep-rft convert rollouts.parquet trl.parquet --to trl
      ep-rft convert rollouts.parquet sft.parquet --to sft --best 2 --reward-min 1
      ep-rft convert rollouts.parquet dpo.parquet --to dpo --margin 0.5
    """
    say(room.convert(source, target, rules=rules, **options))


def datums(
    file: Input,
    batch: Annotated[dict[str, Any], Takes(training.BatchOptions)],
    filters: Annotated[dict[str, Any], Takes(training.Filters)],
    options: Annotated[dict[str, Any], Takes(room.write_datums)],
    *,
    output: Annotated[Path, Flag("-o")],
) -> None:
    """Turn scored rollouts into training data: tokens, logprobs, advantages, weights.

    All of it is one batch, in memory, unless --max-groups or --max-tokens bound it.
    Then each batch is a file of its own, NAME-00000.npz and so on; JSON lines stay
    one file, and each says which batch it is of.

    Args:
        file: Scored rollout file, or what a test wrote; also a URL.
        output: Where to: .npz, .safetensors or .jsonl.

    Examples:
      ep-rft datums rollouts.parquet -o grpo.npz
      ep-rft datums rollouts.parquet -o dapo.npz --algorithm dapo --max-groups 64
      ep-rft datums rollouts.parquet -o step.jsonl --format rl-step
    """
    if filters:
        batch["filters"] = training.Filters(**filters)
    with (
        rollout_file(file, progress=options["progress"]) as source,
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", training.BiasedSamplingWarning)
        summary = room.write_datums(source, output, **options, **batch)
    told = set()
    for warning in seen:
        # Each batch has its own numbers and names its own rows. What is wrong stands before them,
        # and is told once.
        kind = re.sub(r"\d+", "", re.split("[,;]", str(warning.message))[0])
        if kind not in told:
            say(f"ep-rft: warning: {warning.message}", err=True)
        told.add(kind)
    if summary.sampled_tokens is None:
        say(f"{summary.datums} samples of {summary.groups} prompts")
    else:
        batches = f" in {summary.batches} batches" if summary.batches > 1 else ""
        say(
            f"{summary.datums} datums of {summary.groups} prompts{batches}, "
            f"{summary.sampled_tokens} sampled tokens"
        )
    for reason, count in sorted(summary.dropped.items()):
        say(f"dropped {count:>8}  {reason}: {training.DROP_REASONS[reason]}")
    first, *others = summary.files
    say(f"{first} to {others[-1].name}" if others else str(first))
