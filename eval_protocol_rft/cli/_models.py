"""What is done with a model: `ep-rft serve` it, `doctor` its setup, `train` it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from annotated_types import Ge, Le

from eval_protocol_rft import doctor as doctor_room
from eval_protocol_rft import loop, rollout, sampling, training
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import check_placement, fail, say, say_json, say_table
from eval_protocol_rft.cli._flags import Takes, Unset
from eval_protocol_rft.episodes import gateway as agents
from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.engine import VllmOptions
from eval_protocol_rft.loop import fireworks

if TYPE_CHECKING:
    from eval_protocol_rft.loop import MakeParts, TrainResult


def serve(
    *,
    model: Sequence[str] = ("local/arithmetic",),
    host: str = "127.0.0.1",
    port: Annotated[int, Ge(0), Le(65535)] = 8000,
    served_model_name: Annotated[str | None, Flag(unset="--model without local/")] = None,
    api_key: Annotated[str | None, Flag(env="EP_RFT_SERVE_API_KEY", unset="none")] = None,
    reloads: bool = False,
    fireworks: bool = False,
    grpc_port: Annotated[int | None, Ge(0), Le(65535), Flag(unset="--port + 1")] = None,
    state: Annotated[Path | None, Flag(unset="ep-rft-fireworks")] = None,
    log: Annotated[Literal["events", "requests", "none"] | None, Flag(unset="events")] = None,
    placement: Placement,
) -> None:
    r"""Serve a local model over HTTP, in the shape of Fireworks' completions API; or be a whole
    Fireworks on this machine: inference, training, deployments and data sets, for its clients.

    Args:
        model: local/arithmetic (bundled), local/smollm2 (reads and writes English; its weights come
            with another package), or a model folder or hub id, as local/NAME or NAME. With
            --fireworks it may be given several times, and as NAME=PLACE.
        host: Address to listen on. For others than this machine set --api-key too.
        port: Port to listen on; 0 takes a free one.
        served_model_name: What requests call the model.
        api_key: Asked of every request, as 'Authorization: Bearer KEY'.
        reloads: Take new weights while serving, as vLLM does (/collective_rpc reload_weights):
            whoever reaches the port may change the weights.
        fireworks: Be a Fireworks: what its client libraries and recipes ask is answered here.
        grpc_port: With --fireworks: port for clients that speak gRPC (fireworks-ai 0.19), if the
            extra `grpc` is there; 0 takes a free one.
        state: With --fireworks: folder that holds everything; the same one goes on where it was.
        log: With --fireworks: print what happens, every request as well, or nothing.

    Examples:
      ep-rft serve
      ep-rft serve --model local/Qwen/Qwen3-0.6B --port 9000
      ep-rft serve --model ./checkpoint --served-model-name policy
      ep-rft serve --model ./checkpoint --reloads   # for ep-rft train --base-url
      ep-rft serve --fireworks
      ep-rft serve --fireworks --model qwen3-8b=local/arithmetic \
        --state ./try-out   # a recipe that names qwen3-8b, for free
      EP_RFT_SERVE_API_KEY=... ep-rft serve --host 0.0.0.0   # for other machines
    """
    # These are the only definitions of its options: the server is started here alone, and its room
    # needs the extra `serve` to be imported.
    try:
        from eval_protocol_rft.local.server import serve_local

        if fireworks:
            from eval_protocol_rft.loop.service import serve_fireworks
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        fail(
            f"serve needs {package}, which is not installed: "
            "pip install 'eval-protocol-rft[local,serve]'"
        )
    if fireworks:
        if served_model_name is not None or reloads:
            fail(
                "--served-model-name and --reloads are not for --fireworks: name models as "
                "--model NAME=PLACE; its deployments take weights from its trainers",
                code=WRONG,
            )
        serve_fireworks(
            model,
            host=host,
            port=port,
            grpc_port=grpc_port,
            state=state or Path("ep-rft-fireworks"),
            api_key=api_key,
            log=log or "events",
            placement=placement,
            say=say,
        )
        return
    if state is not None or log is not None or grpc_port is not None:
        fail("--state, --log and --grpc-port are for --fireworks", code=WRONG)
    if len(model) > 1:
        fail("--model: one model is served, several with --fireworks alone", code=WRONG)
    serve_local(
        model[0],
        host=host,
        port=port,
        served_model_name=served_model_name,
        reloads=reloads,
        api_key=api_key,
        placement=placement,
        say=say,
        note=lambda text: say(f"ep-rft: {text}", err=True),
    )


_CHATS: dict[str, Any] = {"n": ..., "raw": ..., "add_special_tokens": ...}
"""Turns of a conversation: no raw text."""


def gateway(
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, _CHATS)],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    settings: Annotated[dict[str, Any], Takes(agents.SessionSettings)],
    limits: agents.SessionLimits,
    *,
    output: Annotated[Path | None, Flag("-o", unset="rows are only returned")] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Ge(0), Le(65535)] = 8100,
    gateway_key: Annotated[str | None, Flag(env="EP_RFT_GATEWAY_KEY", unset="made anew")] = None,
) -> None:
    r"""Let agents in any framework or language call a model, and keep each rollout exact to the
    token.

    Speaks OpenAI's Chat Completions and Responses and Anthropic's Messages. Each agent has a
    session, named in its base URL; a session that is finished becomes a row that `ep-rft convert`
    and `build_batch` read.

    Args:
        output: A .jsonl file that rows are appended to.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        gateway_key: What opens sessions, as 'Authorization: Bearer KEY'.

    Examples:
      ep-rft gateway --model local/arithmetic -o sessions.jsonl
      ep-rft gateway --model Qwen/Qwen3-8B --base-url http://localhost:8000 \
        --temperature 1.0 -o sessions.jsonl
      ep-rft gateway --model accounts/fireworks/models/qwen3-8b \
        --tokenizer Qwen/Qwen3-8B --on-other-sampling refuse
    """
    if output is not None and output.suffix != ".jsonl":
        fail(f"-o: {output} must end with .jsonl", code=WRONG)
    if "extra" in params:
        params["extra_body"] = params.pop("extra")
    asked = rollout.parse_completion_params({**params, **request, **server})
    if asked.raw:
        fail("raw text is not for the gateway, whose turns a chat template renders", code=WRONG)
    endpoint = asked.endpoint
    if endpoint is not None and endpoint.is_fireworks:
        settings.setdefault("guided_decoding", True)
    agents.serve_gateway(
        asked,
        settings=agents.SessionSettings(
            params=asked.params,
            pinned=frozenset(agents.PINNABLE) & params.keys(),
            template_kwargs=asked.chat_template_kwargs,
            limits=limits,
            **settings,
        ),
        host=host,
        port=port,
        api_key=gateway_key,
        output=output,
        say=say,
    )


WRONG = 2
"""Exit code where options are wrong: 1 says that the setup is not fit to train."""
_REQUEST = {"n": ..., "seed": Unset("always the same")}
_SAMPLING = {"max_tokens": 64, "timeout": 120.0, "top_p": ..., "stop": ..., "extra": ...}


def doctor(
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams, _SAMPLING)],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, _REQUEST)],
    server: Annotated[dict[str, Any], Takes(sampling.Endpoint, {"base_url": None})],
    setup: Annotated[dict[str, Any], Takes(doctor_room.Setup)],
    run: Annotated[dict[str, Any], Takes(doctor_room.examine)],
    placement: Placement,
    vllm: VllmOptions,
    *,
    json: bool = False,
) -> None:
    r"""Say whether a setup is fit to train: tokenizer, chat template, end of turn, logprobs, seeds,
    and sampler against trainer.

    Exit code 1 if any check fails.

    Args:
        json: Print JSON instead.

    Examples:
      ep-rft doctor --model local/arithmetic
      ep-rft doctor --model vllm/Qwen/Qwen3-0.6B --dtype bfloat16
      ep-rft doctor --model Qwen/Qwen3-8B \
        --base-url http://localhost:8000 --temperature 0.7
      ep-rft doctor --model accounts/fireworks/models/qwen3-8b \
        --tokenizer Qwen/Qwen3-8B --json
    """
    is_local = params["model"].startswith(("local/", "vllm/"))
    weights = setup.get("weights")
    if params.get("temperature", 1.0) == 0:
        fail("--temperature: must be above 0: greedy completions have no policy ratio", code=WRONG)
    if params.get("top_k", 0) > 0:
        fail("--top-k: 0 or -1, as the server spells off: sample from all tokens", code=WRONG)
    if "base_url" in server and is_local:
        fail(
            f"--base-url: {params['model']} is a model of this machine, which asks no server. Name "
            "the model as the server does: ep-rft serve --served-model-name NAME",
            code=WRONG,
        )
    if weights is not None and not weights.is_dir():
        fail(f"--weights: {weights} is no folder", code=WRONG)
    check_placement(placement, here=is_local or weights is not None, there="the server")
    if "tokenizer" not in request and weights is not None and not is_local:
        from eval_protocol_rft.local.models import has_tokenizer

        request |= {"tokenizer": str(weights)} if has_tokenizer(weights) else {}
    try:
        asked = rollout.parse_completion_params({**params, **request, **server})
    except ValueError as error:
        fail(str(error), code=WRONG)
    try:
        to_examine = doctor_room.Setup(request=asked, placement=placement, vllm=vllm, **setup)
        diagnosis = doctor_room.examine(to_examine, **run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; nothing was decided") from None
    if json:
        say_json(doctor_room.diagnosis_json(diagnosis))
    else:
        say_table(doctor_room.diagnosis_table(diagnosis))
        say(doctor_room.summary(diagnosis))
    if doctor_room.unfit(diagnosis.findings):
        raise typer.Exit(1)


_THE_TESTS = {"temperature": Unset("the test's"), "max_tokens": Unset("the test's")}
_READ_BY = {
    "tokenizer": Unset("the test's, or the one beside the weights"),
    "chat_template": Unset("the test's, or the tokenizer's"),
}
_PLACE = {"base_model": Unset("--model"), "deployment": None}


def train(
    evaluator: str,
    run: Annotated[dict[str, Any], Takes(loop.atrain)],
    how: Annotated[dict[str, Any], Takes(loop.LoopOptions)],
    filters: training.Filters,
    optimizer: loop.Optimizer,
    params: Annotated[dict[str, Any], Takes(sampling.SamplingParams, _THE_TESTS, list(_THE_TESTS))],
    request: Annotated[dict[str, Any], Takes(rollout.RolloutRequest, _READ_BY, list(_READ_BY))],
    here: Annotated[dict[str, Any], Takes(loop.LocalParts)],
    there: Annotated[dict[str, Any], Takes(fireworks.FireworksParts, _PLACE)],
    placement: Placement,
    vllm: VllmOptions,
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
            does, or `ep-rft serve --reloads`. With --deployment: where Fireworks is, or a service
            like it, in the place of FIREWORKS_BASE_URL.

    Examples:
      ep-rft train tests/test_math.py::test_math --model local/my-model \
        --steps 200
      ep-rft train tests/test_math.py::test_math --max-staleness 1 \
        --algorithm cispo --steps 200
      ep-rft train tests/test_math.py::test_math \
        --model accounts/fireworks/models/qwen3-8b \
        --deployment my-run --training-shape ts-qwen3-8b-policy \
        --lora-rank 32 --steps 100
      ep-rft train tests/test_math.py::test_math \
        --model accounts/fireworks/models/arithmetic \
        --deployment my-run --training-shape ts-arithmetic \
        --base-url http://localhost:8000   # ep-rft serve --fireworks
      ep-rft train tests/test_math.py::test_math --model vllm/Qwen/Qwen3-0.6B \
        --steps 200   # vLLM samples beside the trainer, on one GPU or more
      ep-rft train tests/test_math.py::test_math --model tiny \
        --base-url http://localhost:8000 --weights ./tiny --steps 50
    """
    on_fireworks = "deployment" in there
    if base_url is not None:
        (there if on_fireworks else params)["base_url"] = _base_url(base_url, on_fireworks)
    if how.keys().isdisjoint(("steps", "epochs")):
        how["epochs"] = 1.0
    from eval_protocol_rft.scoring.executors import load_evaluator

    options = loop.LoopOptions(**how, filters=filters)
    check_placement(placement, here=not on_fireworks, there="Fireworks")
    here |= {
        "placement": placement,
        "vllm": vllm,
        "say": lambda text: say(f"ep-rft: {text}", err=True),
    }
    parts = _parts(optimizer, here, there, run.get("model"))
    try:
        result = loop.train(
            load_evaluator(evaluator).function,
            output,
            options=options,
            completion_params={**params, **request} or None,
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
    for name in ("weights", "trust_remote_code", "sampler", "processes"):
        if on_fireworks and name in here:
            raise loop.SetupError(
                f"{_flag(name)} is for training in this process, and --deployment is on Fireworks"
            )
    for name in ("base_model", "training_shape", "trainer_job", "delete_on_close"):
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


def _base_url(url: str, on_fireworks: bool) -> str | sampling.FireworksAddress:
    if not on_fireworks:
        return url
    if sampling.is_direct_route(url):
        raise loop.SetupError(
            "--base-url: with --deployment this is the address of Fireworks, and a direct route "
            'leads to one deployment alone: name it as "api_base" in the test\'s completion_params'
        )
    return sampling.fireworks_address(url, option="--base-url")


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
