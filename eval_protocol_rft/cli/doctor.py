"""`ep-rft doctor`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from eval_protocol_rft.cli._common import one_line, say, say_json, sigterm_interrupts

_SAMPLING = "Sampling"
_RUN = "Run"


@one_line
def doctor(
    model: Annotated[
        str,
        typer.Option(
            help="local/arithmetic (bundled), local/FOLDER, accounts/... on Fireworks, or the name "
            "that the server of --base-url knows."
        ),
    ],
    base_url: Annotated[
        str | None, typer.Option(help="The server: vLLM, SGLang, ep-rft serve, ...")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the server's API key.",
            show_default="FIREWORKS_API_KEY, sent to Fireworks alone",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id.", show_default="the model's")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder that the trainer loads: compares sampler and trainer.",
            show_default="a local model's own",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="The one to train at, above 0.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            min=-1, max=0, help="How the server spells off: SGLang -1.", rich_help_panel=_SAMPLING
        ),
    ] = 0,
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="Of the whole completions.", rich_help_panel=_SAMPLING),
    ] = 64,
    seed: Annotated[
        int | None,
        typer.Option(
            help="What the probes' seeds are derived from.",
            show_default="always the same",
            rich_help_panel=_SAMPLING,
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
            help="What a vLLM server was started with, to be checked: processed_logprobs or "
            "raw_logprobs.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option(
            min=40,
            help="One-token probes; a tenth as many for whole completions.",
            rich_help_panel=_RUN,
        ),
    ] = 400,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests in flight.",
            show_default="16; local models: 96",
            rich_help_panel=_RUN,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for one attempt.", rich_help_panel=_RUN)
    ] = 120.0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let tokenizer and model folders run their own code.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON instead.", rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Say whether a setup is fit to train: tokenizer, chat template, end of turn, logprobs, seeds,
    and sampler against trainer.

    Exit code 1 if any check fails.

    \b
    Examples:
      ep-rft doctor --model local/arithmetic
      ep-rft doctor --model Qwen/Qwen3-8B --base-url http://localhost:8000 --temperature 0.7
      ep-rft doctor --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B --json
    """
    if not temperature > 0:
        raise _usage("--temperature", "must be above 0: greedy completions have no policy ratio")
    if base_url is not None and model.startswith("local/"):
        raise _usage(
            "--base-url",
            f"{model} is a model in this process, which asks no server. Name the model as the "
            "server does: ep-rft serve --served-model-name NAME",
        )
    if tokenizer is None and weights is not None and not model.startswith("local/"):
        from eval_protocol_rft.local.models import has_tokenizer

        tokenizer = str(weights) if has_tokenizer(weights) else None
    params: dict[str, Any] = {
        "model": model,
        "base_url": base_url,
        "api_key": _api_key(api_key_env),
        "tokenizer": tokenizer,
        "temperature": temperature,
        "top_k": top_k,
        "max_tokens": max_tokens,
        "seed": seed,
        "chat_template_kwargs": _json("--chat-template-kwargs", chat_template_kwargs),
        "logprobs_mode": logprobs_mode,
        "timeout": timeout,
    }

    from eval_protocol_rft.doctor import (
        Setup,
        diagnosis_json,
        diagnosis_table,
        examine,
        summary,
        unfit,
    )
    from eval_protocol_rft.rollout import parse_completion_params

    try:
        request = parse_completion_params({k: v for k, v in params.items() if v is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    setup = Setup(
        request=request,
        weights=weights,
        requests=requests,
        concurrency=concurrency,
        trust_remote_code=trust_remote_code,
    )
    with sigterm_interrupts() as stopped:
        try:
            diagnosis = examine(setup, progress=not quiet)
        except KeyboardInterrupt:
            say("ep-rft: stopped; nothing was decided", err=True)
            raise typer.Exit(stopped.exit_code) from None
    if json_output:
        say_json(diagnosis_json(diagnosis))
    else:
        from rich.console import Console

        Console().print(diagnosis_table(diagnosis))
        say(summary(diagnosis))
    if unfit(diagnosis.findings):
        raise typer.Exit(1)


def _usage(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    if not os.environ.get(name):
        raise _usage("--api-key-env", f"there is no environment variable {name}")
    return os.environ[name]


def _json(option: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _usage(option, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _usage(option, f"must be a JSON object, got {text}")
    return value
