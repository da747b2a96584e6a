"""What docs/exports.md says to write into six trainers, run with their own classes on a model that
is served here: what comes out is what was sampled, scored by an evaluation test."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.arithmetic import test_arithmetic as example
from tests import trainers

pytestmark = pytest.mark.trainers
if not trainers.FOLDER:
    pytest.skip(trainers.MISSING, allow_module_level=True)
torch = pytest.importorskip("torch")

from eval_protocol_rft.local.models import bundled_model_path  # noqa: E402
from tests.loop.policies import arithmetic_sampler  # noqa: E402
from tests.test_server_reloads import serving  # noqa: E402

N = 8
SUMS = [(17, 25), (80, 41), (3, 9)]
LINES = [
    {"messages": [{"role": "user", "content": f"{a}+{b}="}], "ground_truth": str(a + b)}
    for a, b in SUMS
]
PAGE = Path(__file__).parents[2] / "docs" / "exports.md"


def snippets() -> dict[str, str]:
    """The code below "More trainers", by the word before it that is bold."""
    section = PAGE.read_text().partition("## More trainers")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for text, code in re.findall(r"(.*?)```python\n(.*?)```", section, re.DOTALL):
        (name,) = re.findall(r"^\*\*([^*,]+)\*\*", text, re.MULTILINE)[-1:]
        found[name] = code
    return found


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What the snippets take as there, and `rolled_out`."""
    with trainers.sources(), serving(arithmetic_sampler(), reloads=False) as server:
        folder = str(bundled_model_path("arithmetic"))
        names: dict[str, Any] = {
            "test_answer": example.test_arithmetic,
            "name": "m",
            "url": str(server.client.base_url),
            "folder": folder,
            "eos": server.sampler.tokenizer.eos_token_id,
            "lines": LINES,
            "sampler": server.sampler,
        }
        exec(snippets()["To plug one in"], names)  # noqa: S102
        yield names


def run(name: str, names: dict[str, Any]) -> dict[str, Any]:
    scope = dict(names)
    exec(snippets()[name], scope)  # noqa: S102
    return scope


def prompts(names: dict[str, Any]) -> list[list[int]]:
    tokenizer = names["sampler"].tokenizer
    return [
        tokenizer.apply_chat_template(
            line["messages"], add_generation_prompt=True, return_dict=False
        )
        for line in LINES
    ]


def reward_of(names: dict[str, Any], place: int, ids: list[int]) -> float:
    text = names["sampler"].tokenizer.decode(ids, skip_special_tokens=True).strip()
    return float(text == LINES[place]["ground_truth"])


def test_every_snippet_is_run_here() -> None:
    assert [*snippets()] == [
        "To plug one in", "SkyRL", "slime", "prime-rl", "AReaL", "NeMo-RL", "OpenRLHF",
    ]  # fmt: skip


def test_skyrl(names: dict[str, Any]) -> None:
    from skyrl.train.generators.base import TrajectoryID
    from skyrl.train.utils.trainer_utils import validate_generator_output

    ids = [TrajectoryID(f"uid-{i}", n) for i in range(len(LINES)) for n in range(N)]
    lines = [line for line in LINES for _ in range(N)]
    output = asyncio.run(
        run("SkyRL", names)["Rollouts"]().generate(
            {
                "prompts": [line["messages"] for line in lines],
                "env_extras": [{"ground_truth": line["ground_truth"]} for line in lines],
                "trajectory_ids": ids,
            }
        )
    )
    validate_generator_output(len(lines), output)
    assert output["trajectory_ids"] == ids
    for i, (prompt, response, reward) in enumerate(
        zip(output["prompt_token_ids"], output["response_ids"], output["rewards"], strict=True)
    ):
        assert prompt == prompts(names)[i // N]
        assert reward == reward_of(names, i // N, response)


def test_slime(names: dict[str, Any]) -> None:
    from slime.utils.types import Sample

    def get_samples(count: int) -> list[list[Any]]:
        return [
            [Sample(prompt=line["messages"], label=line["ground_truth"]) for _ in range(N)]
            for line in LINES[:count]
        ]

    generate_rollout = run("slime", names)["generate_rollout"]
    args, source = SimpleNamespace(rollout_batch_size=2), SimpleNamespace(get_samples=get_samples)
    for _step in range(2):  # the second in an event loop of its own
        groups = generate_rollout(args, 0, source)
        assert [len(group) for group in groups] == [N, N]
        for i, group in enumerate(groups):
            for sample in group:
                size = sample.response_length
                assert sample.tokens[:-size] == prompts(names)[i]
                assert sample.reward == reward_of(names, i, sample.tokens[-size:])


def test_prime_rl(names: dict[str, Any], tmp_path: Path) -> None:
    from prime_rl.transports.rollouts.filesystem import FileSystemMicroBatchReceiver

    run("prime-rl", names)["send"](LINES, tmp_path, 0, 64, 1)
    micro_batches = FileSystemMicroBatchReceiver(tmp_path, 0).receive()
    credit = [value for each in micro_batches for value in each.advantages]
    trained = [value for each in micro_batches for value in each.loss_mask]
    assert any(credit)
    assert not any(value for value, acts in zip(credit, trained, strict=True) if not acts)


def test_areal(names: dict[str, Any]) -> None:
    from areal.api.io_struct import ModelResponse
    from areal.infra.workflow_executor import check_trajectory_format

    class Engine:
        async def agenerate(self, request: Any) -> Any:
            assert request.gconfig.stop_token_ids == [names["eos"]]
            reply = await sampled(names, request.input_ids, request.gconfig.max_new_tokens)
            return ModelResponse(
                input_tokens=request.input_ids,
                output_tokens=reply.token_ids,
                output_logprobs=reply.logprobs,
                output_versions=[4] * len(reply.token_ids),
                stop_reason=reply.finish_reason,
            )

    workflow = run("AReaL", names)["Rollouts"]()
    result = asyncio.run(workflow.arun_episode(Engine(), LINES[0]))
    assert check_trajectory_format(result, batch_size=1)
    response = result["input_ids"][result["loss_mask"].bool()].tolist()
    assert result["input_ids"][0].tolist() == prompts(names)[0] + response
    assert result["rewards"].item() == reward_of(names, 0, response)
    assert {*result["versions"][0].tolist()} == {-1, 4}


def test_nemo_rl(names: dict[str, Any]) -> None:
    batch = run("NeMo-RL", names)["final_batch"]
    assert batch.size == len(LINES) * N
    for i, (log, reward) in enumerate(
        zip(batch["message_log"], batch["total_reward"].tolist(), strict=True)
    ):
        prompt, answer = log
        assert prompt["token_ids"].tolist() == prompts(names)[i // N]
        assert reward == reward_of(names, i // N, answer["token_ids"].tolist())


def test_openrlhf(names: dict[str, Any]) -> None:
    class Engine:
        async def generate(self, prompt_ids: list[int], wanted: Any) -> Any:
            reply = await sampled(names, prompt_ids, wanted.max_tokens)
            logprobs = [
                {i: SimpleNamespace(logprob=value), i + 1: SimpleNamespace(logprob=-9.0)}
                for i, value in zip(reply.token_ids, reply.logprobs, strict=True)
            ]
            output = SimpleNamespace(
                token_ids=tuple(reply.token_ids),
                logprobs=logprobs,
                finish_reason=reply.finish_reason,
            )
            return SimpleNamespace(outputs=[output])

    tokenizer = names["sampler"].tokenizer
    prompt = tokenizer.decode(prompts(names)[1])
    result = asyncio.run(
        run("OpenRLHF", names)["AgentExecutor"]().execute(
            prompt,
            LINES[1]["ground_truth"],
            SimpleNamespace(temperature=1.0, max_tokens=8),
            64,
            tokenizer,
            Engine(),
        )
    )
    (span,) = result["action_ranges"]
    tokens = result["observation_tokens"]
    assert tokens[: span[0]] == prompts(names)[1]
    assert result["reward"] == reward_of(names, 1, tokens[slice(*span)])
    assert (result["prompt"], result["label"]) == (prompt, LINES[1]["ground_truth"])


async def sampled(names: dict[str, Any], ids: list[int], max_tokens: int) -> Any:
    from eval_protocol_rft.sampling import SamplingParams

    return await names["sampler"].sample(ids, SamplingParams(model="m", max_tokens=max_tokens))
