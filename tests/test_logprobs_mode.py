"""A user's word about a server's logprobs is seen before the first completion counts, in every way
into the package: real HTTP on loopback, the bundled model behind it in vLLM's shape."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from transformers import AutoModelForCausalLM

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop._run_options import LoopOptions
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.sampling._limits import RunStoppedError
from eval_protocol_rft.sampling._types import Completion, RefusedError, SamplingParams
from tests.doctor.liars import bundled, vllm_app
from tests.rollouts import config_of, record_of_row
from tests.serving import running

FOLDER = str(bundled_model_path("arithmetic"))
CONTRADICTED = "logprobs_mode is 'processed_logprobs', and the server's logprobs are raw ones"


class Counted:
    """The bundled model, and how many tokens it was asked for at which temperature."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[int | None, float]] = Counter()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        self.asked[params.max_tokens, params.temperature] += 1
        return await bundled().sample(prompt_ids, params, seed=seed)

    async def aclose(self) -> None:
        """The bundled model is everybody's."""


@pytest.fixture(params=["processed", "raw"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, Counted, bool]]:
    sampler, honest = Counted(), request.param == "processed"
    app = vllm_app(sampler, processed=honest, echo=lambda ids: ids)
    with running(app) as url:
        yield f"{url}/v1", sampler, honest


def params_of(url: str, **changes: Any) -> dict[str, Any]:
    asked = {"model": "m", "api_base": url, "tokenizer": FOLDER, "n": 2, "max_tokens": 8}
    return {**asked, "temperature": 0.7, "logprobs_mode": "processed_logprobs", **changes}


async def outcomes(
    processor: FireworksTrainingRolloutProcessor, rows: list[EvaluationRow], params: dict[str, Any]
) -> list[Any]:
    """Rows, or what was raised for them."""
    try:
        tasks = processor(rows, config_of(params))
        return await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await processor.acleanup()


def row(text: str) -> EvaluationRow:
    return EvaluationRow(messages=[Message(role="user", content=text)])


def true_logprobs(prompt: list[int], ids: list[int], temperature: float) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()


async def test_the_processor_checks_it_once_for_all_rows(server: Any) -> None:
    url, sampler, honest = server
    processor = FireworksTrainingRolloutProcessor()
    rows = [row(f"{i}+{i}=") for i in range(10, 16)]
    ended = await outcomes(processor, rows, params_of(url))
    probes = {key: n for key, n in sampler.asked.items() if key[0] == 1}
    assert max(probes.values()) <= 4 * 16  # once, for all rows
    if not honest:
        assert all(isinstance(one, RunStoppedError) for one in ended), ended
        assert CONTRADICTED in str(ended[0])
        assert "--logprobs-mode processed_logprobs`, or leave" in str(ended[0])
        assert (8, 0.7) not in sampler.asked  # nothing was sampled that could count
        return
    record = record_of_row(ended[0])
    assert sampler.asked[8, 0.7] == 12
    for ids, logprobs in zip(record.completion_ids, record.inference_logprobs, strict=True):
        np.testing.assert_allclose(logprobs, true_logprobs(record.prompt_ids, ids, 0.7), atol=1e-3)


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"logprobs_mode": None}])
async def test_nothing_is_asked_where_nothing_can_be_wrong(server: Any, changes: Any) -> None:
    url, sampler, _ = server
    await outcomes(FireworksTrainingRolloutProcessor(), [row("1+2=")], params_of(url, **changes))
    assert not [key for key in sampler.asked if key[0] == 1]


async def test_generate_checks_it(server: Any, tmp_path: Path) -> None:
    url, _, honest = server
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "12+34="}) + "\n")
    output = tmp_path / "r.parquet"
    work = agenerate(tmp_path / "d.jsonl", output, params_of(url), progress=False)
    if honest:
        await work
        assert output.exists()
    else:
        with pytest.raises(RunStoppedError, match=CONTRADICTED):
            await work
        assert not output.exists()


@pytest.mark.parametrize("server", ["raw"], indirect=True)
async def test_train_checks_it(server: Any, tmp_path: Path) -> None:
    url, _, _ = server

    def right(row: EvaluationRow) -> EvaluateResult:
        return EvaluateResult(score=1.0)

    lines = [{"messages": [{"role": "user", "content": f"{i}+1="}]} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    class Unpublished(LocalParts):
        async def make(self, *arguments: Any) -> Any:
            return replace(await super().make(*arguments), publish_first=False)

    with pytest.raises(RunStoppedError, match=CONTRADICTED):
        await atrain(
            right,
            tmp_path / "run",
            options=LoopOptions(steps=1, groups_per_step=2),
            data=[str(tmp_path / "d.jsonl")],
            held_out=0,
            completion_params=params_of(url),
            parts=Unpublished(weights=Path(FOLDER)),
            progress=False,
        )


async def test_a_server_that_fails_meanwhile_fails_the_row_and_is_asked_again() -> None:
    sampler = Counted()
    fail = asyncio.Event()
    app = vllm_app(sampler, processed=True, echo=lambda ids: ids)
    original = sampler.sample

    async def sample(*arguments: Any, **options: Any) -> Completion:
        if not fail.is_set():
            raise RefusedError("not now")
        return await original(*arguments, **options)

    sampler.sample = sample  # type: ignore[method-assign]
    with running(app) as url:
        processor = FireworksTrainingRolloutProcessor()
        asked = params_of(f"{url}/v1")
        [first] = await asyncio.gather(
            *processor([row("1+2=")], config_of(asked)), return_exceptions=True
        )
        assert "logprobs cannot be checked" in str(first)
        fail.set()
        [second] = await outcomes(processor, [row("1+2=")], asked)
        assert len(record_of_row(second)) == 2
