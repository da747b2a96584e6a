"""`ep-rft generate`.

Options of `ep-rft generate` that need more than typer to be read.

Invariant: one that is wrong ends the command before anything heavy is imported.

What `ep-rft generate` says at its end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft.cli._common import fail, one_line, say, sigterm_interrupts

if TYPE_CHECKING:
    from eval_protocol_rft.data import GenerateSummary
    from eval_protocol_rft.sampling import Prices


def api_key(name: str | None) -> str | None:
    """The key in the environment variable `name`."""
    if name is None:
        return None
    if not os.environ.get(name):
        fail(f"--api-key-env {name}: there is no such environment variable")
    return os.environ[name]


def json_object(option: str, text: str | None) -> Any:
    """What `option` holds as JSON; None where it was not given."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        fail(f"{option}: not JSON: {error}")
    if not isinstance(value, dict):
        fail(f"{option}: must be a JSON object, got {text}")
    return value


def check_format(output: Path, wanted: str | None) -> None:
    """See that `--format` and the output's name agree."""
    suffixes = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
    if wanted is not None and wanted not in suffixes:
        fail(f"--format must be parquet or jsonl, got {wanted!r}")
    if wanted is not None and output.suffix not in suffixes[wanted]:
        fail(f"--format {wanted} and the output's name {output.name!r} contradict each other")


def prices(price_in: float | None, price_out: float | None) -> Prices | None:
    """What `--price-in` and `--price-out` say, dollars per million tokens."""
    if price_in is None and price_out is None:
        return None
    if price_in is None or price_out is None:
        fail("--price-in and --price-out go together: half of a cost would pass for all of it")

    from eval_protocol_rft.sampling import Prices

    try:
        return Prices(prompt=price_in, completion=price_out)
    except ValueError as error:
        fail(str(error))


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


_DATA = "Data set"
_SAMPLING = "Sampling"
_RUN = "Run"


@one_line
def generate(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="Parquet, JSONL, JSON, CSV or TSV, text also as .gz or .zst: files, folders, "
            "patterns; or a folder saved by `datasets`.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .parquet or .jsonl file.")],
    model: Annotated[
        str,
        typer.Option(
            help="local/arithmetic (bundled), local/FOLDER, accounts/... on Fireworks, or the name "
            "that the server of --base-url knows."
        ),
    ],
    n: Annotated[int, typer.Option("-n", min=1, help="Completions per prompt.")] = 1,
    base_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server that tells token ids: vLLM, SGLang, ..."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the server's API key.",
            show_default="FIREWORKS_API_KEY, sent to Fireworks alone",
        ),
    ] = None,
    prompt_key: Annotated[
        str | None,
        typer.Option(
            help="Column of the prompts: text, lists of chat messages, or (prompt_token_ids) ids "
            "that are sampled from as they are.",
            show_default="the first of prompt_token_ids, prompt, messages, question, problem, "
            "instruction",
            rich_help_panel=_DATA,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System message for prompts that have none.", rich_help_panel=_DATA),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many rows.", rich_help_panel=_DATA)
    ] = None,
    shuffle_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Shuffle the rows, before --limit.", rich_help_panel=_DATA),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="Only rows of which this is true, e.g. \"level >= 3 and subject == 'algebra'\".",
            rich_help_panel=_DATA,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, rich_help_panel=_SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(max=1.0, rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=-1, help="0 or -1: off.", rich_help_panel=_SAMPLING)
    ] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens per completion.",
            show_default="2048; local: what the context holds",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Ends a completion; repeat for several.", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="What each completion's own seed is derived from.",
            show_default="drawn and recorded where seeds are free",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id.", show_default="the model's", rich_help_panel=_SAMPLING
        ),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="E.g. '{\"enable_thinking\": false}'.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    logprobs_mode: Annotated[
        str | None,
        typer.Option(
            help="What a vLLM server was started with: processed_logprobs or raw_logprobs.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Further fields of the request.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests in flight.",
            show_default="found out as it goes; local models: 96",
            rich_help_panel=_RUN,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for one attempt.", rich_help_panel=_RUN)
    ] = 600.0,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Requests per completion.", rich_help_panel=_RUN)
    ] = 8,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Sample failed completions again.", rich_help_panel=_RUN
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an output of other settings.", rich_help_panel=_RUN
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let tokenizer and model folders run their own code.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="local|ray",
            help="ray: sample on every node of a Ray cluster.",
            rich_help_panel=_RUN,
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the cluster, or auto.",
            show_default="RAY_ADDRESS, else this machine",
            rich_help_panel=_RUN,
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="parquet or jsonl.",
            show_default="by the output's name",
            rich_help_panel=_RUN,
        ),
    ] = None,
    price_in: Annotated[
        float | None,
        typer.Option(
            metavar="USD",
            min=0.0,
            help="Per million prompt tokens; with --price-out, the end says what it cost.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    price_out: Annotated[
        float | None,
        typer.Option(
            metavar="USD", min=0.0, help="Per million sampled tokens.", rich_help_panel=_RUN
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Latencies, retries and requests in flight at the end.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Sample n completions for every row of a data set, with exact tokens and logprobs.

    Interrupt it in any way: what was finished is on disk, and the same command goes on with what is
    missing.

    \b
    Examples:
      ep-rft generate problems.jsonl -o rollouts.parquet -n 8 --model local/arithmetic
      ep-rft generate train.parquet -o rollouts.parquet -n 16 \\
        --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B
      ep-rft generate math.jsonl -o rollouts.parquet -n 8 --prompt-key problem \\
        --model Qwen/Qwen3-8B --base-url http://localhost:8000 --where "level >= 3"
      ep-rft generate easy.jsonl.gz 'shards/*.jsonl' -o rollouts.parquet --model local/arithmetic
    """
    params: dict[str, Any] = {
        "model": model,
        "n": n,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_tokens": max_tokens,
        "stop": stop or None,
        "seed": seed,
        "base_url": base_url,
        "api_key": api_key(api_key_env),
        "tokenizer": tokenizer,
        "chat_template_kwargs": json_object("--chat-template-kwargs", chat_template_kwargs),
        "logprobs_mode": logprobs_mode,
        "extra_body": json_object("--extra-body", extra_body),
        "timeout": timeout,
    }
    check_format(output, output_format)
    known_prices = prices(price_in, price_out)

    from eval_protocol_rft.data import generate as run
    from eval_protocol_rft.data import parts_folder
    from eval_protocol_rft.sampling import RetryPolicy

    with sigterm_interrupts() as stopped:
        try:
            summary = run(
                data,
                output,
                {key: value for key, value in params.items() if value is not None},
                prompt_key=prompt_key,
                system=system,
                limit=limit,
                shuffle_seed=shuffle_seed,
                where=where,
                concurrency=concurrency,
                retry=RetryPolicy(max_attempts=max_attempts),
                retry_failed=retry_failed,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                engine=engine,
                ray_address=ray_address,
                prices=known_prices,
                progress=not quiet,
            )
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            safe = "What was stored is safe: make room, and run the same command"
            fail(f"{output}: {error.strerror}. {safe}")
        except KeyboardInterrupt:
            folder = parts_folder(output)
            where_it_is = f" What was finished is in {folder}." if folder.exists() else ""
            say(f"ep-rft: stopped.{where_it_is} The same command goes on", err=True)
            raise typer.Exit(stopped.exit_code) from None
    show(summary, verbose=verbose)
    if summary.failed == summary.total:
        raise typer.Exit(1)
