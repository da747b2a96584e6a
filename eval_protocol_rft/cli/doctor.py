"""`ep-rft doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import eval_protocol_rft.doctor as room
from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.cli._common import fail, say, say_json
from eval_protocol_rft.cli._flags import Takes, Unset

WRONG = 2
"""Exit code where options are wrong: 1 says that the setup is not fit to train."""
_REQUEST = {"n": ..., "seed": Unset("always the same")}
_SAMPLING = {"max_tokens": 64, "timeout": 120.0, "top_p": ..., "stop": ..., "extra": ...}


def doctor(
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams, _SAMPLING)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, _REQUEST)],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    setup: Annotated[dict[str, Any], Takes(room.Setup)],
    run: Annotated[dict[str, Any], Takes(room.examine)],
    *,
    json: bool = False,
) -> None:
    """Say whether a setup is fit to train: tokenizer, chat template, end of turn, logprobs, seeds,
    and sampler against trainer.

    Exit code 1 if any check fails.

    Args:
        json: Print JSON instead.

    Examples:
      ep-rft doctor --model local/arithmetic
      ep-rft doctor --model Qwen/Qwen3-8B --base-url http://localhost:8000 --temperature 0.7
      ep-rft doctor --model accounts/fireworks/models/qwen3-8b --tokenizer Qwen/Qwen3-8B --json
    """
    is_local = params["model"].startswith("local/")
    weights = setup.get("weights")
    if params.get("temperature", 1.0) == 0:
        fail("--temperature: must be above 0: greedy completions have no policy ratio", code=WRONG)
    if params.get("top_k", 0) > 0:
        fail("--top-k: 0 or -1, as the server spells off: sample from all tokens", code=WRONG)
    if "base_url" in server and is_local:
        fail(
            f"--base-url: {params['model']} is a model in this process, which asks no server. Name "
            "the model as the server does: ep-rft serve --served-model-name NAME",
            code=WRONG,
        )
    if weights is not None and not weights.is_dir():
        fail(f"--weights: {weights} is no folder", code=WRONG)
    if "tokenizer" not in request and weights is not None and not is_local:
        from eval_protocol_rft.local.models import has_tokenizer

        request |= {"tokenizer": str(weights)} if has_tokenizer(weights) else {}
    try:
        asked = rollout.parse_completion_params({**params, **request, **server})
    except ValueError as error:
        fail(str(error), code=WRONG)
    try:
        diagnosis = room.examine(room.Setup(request=asked, **setup), **run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; nothing was decided") from None
    if json:
        say_json(room.diagnosis_json(diagnosis))
    else:
        from rich.console import Console

        Console().print(room.diagnosis_table(diagnosis))
        say(room.summary(diagnosis))
    if room.unfit(diagnosis.findings):
        raise typer.Exit(1)
