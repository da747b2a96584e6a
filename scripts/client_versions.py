r"""What each version of Fireworks' client libraries asks a server for, and whether it is answered.

    ep-rft serve --fireworks STATE      # in another terminal, for this script alone
    export FIREWORKS_BASE_URL=... FIREWORKS_API_KEY=...
    python scripts/client_versions.py ENVIRONMENTS --requests STATE/requests.jsonl \
        --versions 1.2.12 1.2.28 newest

Each version has an environment in the folder ENVIRONMENTS, made if it is not there, and makes the
calls of a training run: the SDK as the cookbook's recipes use it (job, reference, deployment, two
steps by a loss on the server and one of its own, hot loads, samples, checkpoint, promotion),
`AsyncFireworks` as `iterate` uses it, and the key check of the `ep` command. What the server's own
log says of it becomes the table that is printed: requests a version made, and other statuses than
200. 404 is the answer to "is it there?"; what no endpoint answers is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "accounts/fireworks/models/arithmetic"
SHAPE = "accounts/fireworks/trainingShapes/ts-arithmetic"
TOKENIZER = REPOSITORY / "eval_protocol_rft" / "local" / "models" / "arithmetic"
NAMES = re.compile(
    r"(?<=/)(accounts(?!/fireworks)|models|deployments|datasets|rlorTrainerJobs/acc|rlorTrainerJobs"
    r"|deployedModels|checkpoints|trainingShapes)/([^/:?]+)"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", type=Path)
    parser.add_argument("--requests", type=Path, required=True, help="the server's own log")
    parser.add_argument("--versions", nargs="+", default=["1.2.12", "1.2.28", "newest"])
    return parser.parse_args()


def main() -> int:
    options = arguments()
    asked: dict[str, list[dict[str, Any]]] = {}
    for version in options.versions:
        python = environment(options.environments / version, version)
        before = len(options.requests.read_text().splitlines())
        label = subprocess.run(  # noqa: S603 - our own script
            [python, __file__, "--calls", f"client-{version.replace('.', '-')}-{int(time.time())}"],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = options.requests.read_text().splitlines()[before:]
        print(f"{version}: exit status {label.returncode}, {len(lines)} requests", file=sys.stderr)
        if label.returncode:
            return label.returncode
        asked[label.stdout.split()[-1]] = [json.loads(line) for line in lines]
    print(table(asked))
    unanswered = [line for lines in asked.values() for line in lines if line["unanswered"]]
    for line in unanswered:
        print(f"nothing answers {kind(line)} of {line['who']}", file=sys.stderr)
    return 1 if unanswered else 0


def environment(folder: Path, version: str) -> Path:
    """The interpreter of a version's environment."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        package = "fireworks-ai[training-sdk]" + ("" if version == "newest" else f"=={version}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
        subprocess.run(  # noqa: S603
            [python, "-m", "pip", "install", "--quiet", f"{REPOSITORY}[local]", package], check=True
        )
        (folder / "done").touch()
    return python


def table(asked: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each kind of request, a column for each version."""
    counts = {version: Counter(map(kind, lines)) for version, lines in asked.items()}
    other = {
        version: Counter(
            (kind(line), line["status"]) for line in lines if line["status"] not in (200, 204)
        )
        for version, lines in asked.items()
    }
    rows = [
        f"| request | {' | '.join(asked)} |",
        f"| --- |{' ---: |' * len(asked)}",
    ]
    for name in sorted(set().union(*counts.values()), key=lambda name: name.split(" ")[::-1]):
        cells = []
        for version in asked:
            statuses = ", ".join(
                f"{count} x {status}"
                for (other_name, status), count in sorted(other[version].items())
                if other_name == name
            )
            count = counts[version][name]
            cells.append(f"{count}{f' ({statuses})' if statuses else ''}" if count else "")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def kind(line: dict[str, Any]) -> str:
    """Method and path of a request, with `*` for what somebody named."""
    path = line["path"]
    if not path.startswith("/hot_load/"):
        path = NAMES.sub(lambda match: f"{match[1]}/*", path)
    return f"{line['method']} {path}"


# The calls of one version, in its environment


def calls(name: str) -> None:
    from importlib.metadata import version

    from eval_protocol.auth import verify_api_key_and_get_account_id

    os.environ["FIREWORKS_API_BASE"] = os.environ["FIREWORKS_BASE_URL"]
    if not verify_api_key_and_get_account_id():
        raise SystemExit("the key check of `ep` gave no account")
    train(name)
    asyncio.run(fine_tune(name))
    print(version("fireworks-ai"))


def train(name: str) -> None:
    """As the cookbook's recipes do it."""
    from fireworks.training import sdk
    from transformers import AutoTokenizer

    try:
        from fireworks.training.sdk import types
    except ImportError:  # as of 1.2.28; before that it is this package
        import tinker as types

    where = {
        "base_url": os.environ["FIREWORKS_BASE_URL"],
        "api_key": os.environ["FIREWORKS_API_KEY"],
    }
    with sdk.FireworksClient(**where) as client:
        if client.model_is_moe(MODEL):
            raise SystemExit(f"{MODEL} is no mixture of experts")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    service = sdk.FiretitanServiceClient.from_firetitan_config(
        **where,
        base_model=MODEL,
        tokenizer_model=str(TOKENIZER),
        training_shape_id=SHAPE,
        lora_rank=0,
        learning_rate=1e-4,
        deployment_id=name,
        reference_required=True,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="scale_to_zero",
    )
    try:
        policy = service.create_training_client(MODEL, lora_rank=0)
        sampler = service.create_deployment_sampler(tokenizer=tokenizer)
        reference = service.create_reference_client(policy_client=policy)
        snapshot = policy.save_weights_for_sampler("step-0", checkpoint_type="base").result()
        service.hotload_sampler_snapshot(snapshot.path)
        prompt = [257, *map(int, tokenizer.encode("user\n12+34="))]
        for step in (1, 2):
            completions = asyncio.run(
                sampler.sample_with_prompt_tokens(
                    prompt, n=2, max_tokens=4, temperature=1.0, top_p=1.0, top_k=0, logprobs=True
                )
            )
            data = [datum(types, c, advantage=1.0 - 2 * i) for i, c in enumerate(completions)]
            plain = [plain_datum(types, c) for c in completions]
            reference.forward(plain, "cross_entropy").result()
            clip = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
            policy.forward_backward(data, "ppo", loss_fn_config=clip).result()
            policy.forward_backward_custom(plain, own_loss).result()
            policy.optim_step(
                types.AdamParams(learning_rate=1e-4),
                grad_accumulation_normalization="num_loss_tokens",
            ).result()
            snapshot = policy.save_weights_for_sampler(f"step-{step}").result()
            service.hotload_sampler_snapshot(snapshot.path)
        policy.save_state("step-2").result()
        rows = service.list_checkpoints(service.trainer_job_id)
        promotable = [row for row in rows if row.get("promotable")]
        newest = max(promotable, key=lambda row: row["createTime"])
        service.promote_checkpoint(
            name=newest["name"], output_model_id=f"{name}-promoted", base_model=MODEL
        )
        policy.load_state_with_optimizer(policy.resolve_checkpoint_path("step-2")).result()
    finally:
        service.close()


def datum(types: Any, completion: Any, *, advantage: float) -> Any:
    """Of a loss on the server: [N-1] values at the targets."""
    tokens, start = list(completion.full_tokens), completion.prompt_len - 1
    sampled = list(completion.sampling_logprobs)
    size = len(tokens) - 1

    def tensor(values: list[float]) -> Any:
        return types.TensorData(data=values, dtype="float32", shape=[size])

    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[size]),
            "logprobs": tensor([0.0] * start + sampled),
            "advantages": tensor([0.0] * start + [advantage] * len(sampled)),
        },
    )


def plain_datum(types: Any, completion: Any) -> Any:
    tokens = list(completion.full_tokens)
    targets = types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets},
    )


def own_loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    loss = sum(values.exp().sum() for values in logprobs)
    return loss, {"own": float(loss.detach())}


async def fine_tune(name: str) -> None:
    """Two steps of fine-tuning as jobs, by our `iterate`."""
    from eval_protocol.models import EvaluateResult, EvaluationRow, Message
    from fireworks import AsyncFireworks

    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from eval_protocol_rft.loop.fireworks import StepSettings, iterate

    def right(row: EvaluationRow) -> EvaluationRow:
        answer = str(row.messages[-1].content).strip()
        row.evaluation_result = EvaluateResult(score=float(answer == row.ground_truth))
        return row

    right.__annotations__ = {"row": EvaluationRow, "return": EvaluationRow}
    rows = [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+13=")], ground_truth=str(a + 13))
        for a in range(11, 15)
    ]
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncFireworks(account_id="acc") as client:
            await iterate(
                right,
                rows,
                client=client,
                run=name,
                folder=Path(folder) / "run",
                steps=2,
                base_model=MODEL,
                deployment=f"{name}-steps",
                settings=StepSettings(learning_rate=1e-4, lora_rank=8),
                completion_params={"n": 4, "max_tokens": 6},
                processor=FireworksTrainingRolloutProcessor(tokenizer=str(TOKENIZER)),
                poll_seconds=1.0,
            )
            await chat(client, f"{MODEL}#accounts/acc/deployments/{name}-steps")


async def chat(client: Any, model: str) -> None:
    """An answer whole, and one in pieces."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "12+34="}],
        "max_tokens": 6,
        "logprobs": True,
    }
    whole = await client.chat.completions.create(**request)
    if not whole.choices[0].message.content:
        raise SystemExit("an empty answer")
    pieces = [piece async for piece in await client.chat.completions.create(**request, stream=True)]
    if pieces[-1].choices and not pieces[-1].choices[0].finish_reason:
        raise SystemExit("a stream that does not end")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--calls"]:
        calls(sys.argv[2])
    else:
        sys.exit(main())
