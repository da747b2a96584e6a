"""The clients that people have, against `ep-rft serve`'s application and the bundled model."""

from __future__ import annotations

import asyncio
import json
from typing import NamedTuple

import httpx
import numpy as np
import openai
import pytest
import torch
from eval_protocol.integrations.fireworks_v1_completions_client import FireworksV1CompletionsClient
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig
from fireworks.training.sdk.sampling import DeploymentSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RolloutRecord
from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.local.server._app import create_app
from tests.serving import running
from tests.waiting import PATIENCE

MODEL = "accounts/local/deployments/arithmetic"
LOCAL = {"model": "local/arithmetic"}
FOLDER = bundled_model_path("arithmetic")
MAX_TOKENS = 12
QUESTIONS = ["12+34=", "7+5=", "90+19=", "55+55="]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def url():
    torch.set_num_threads(1)
    sampler = LocalSampler.from_pretrained(FOLDER)
    app = create_app(
        sampler, sampler.tokenizer, model_name=MODEL, context_length=sampler.context_length
    )
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [rendered(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


class Greedy(NamedTuple):
    """What a client made of one greedy completion."""

    ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    """Sampling logprobs, where the client reads them."""


@pytest.fixture(scope="module")
def greedy_ids(model, tokenizer, prompts) -> list[list[int]]:
    """Greedy ids by plain forwards of the model, no cache and no batch."""
    return [greedy(model, prompt, tokenizer.eos_token_id) for prompt in prompts]


@torch.no_grad()
def greedy(model, prompt: list[int], eos: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < MAX_TOKENS and eos not in ids:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids


async def eval_protocol_client(url: str, tokenizer, prompt: list[int]) -> Greedy:
    client = FireworksV1CompletionsClient(
        model_id=MODEL,
        tokenizer_name_or_path=str(FOLDER),
        api_key="none",
        base_url=url,
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        request_params={"top_p": 1.0, "top_k": 0},
    )
    try:
        result = await client.create_completion_from_prompt_ids(prompt_token_ids=prompt)
    finally:
        await client.close()
    assert result["prompt_ids"] == prompt
    return Greedy(result["completion_ids"], result["finish_reason"], result["completion_logprobs"])


async def deployment_sampler(url: str, tokenizer, prompt: list[int]) -> Greedy:
    sampler = DeploymentSampler(url, MODEL, "none", tokenizer)
    try:
        (sampled,) = await sampler.sample_with_prompt_tokens(
            prompt, max_tokens=MAX_TOKENS, temperature=0.0, logprobs=True
        )
    finally:
        sampler.close()
    (metrics,) = sampler.drain_metrics()
    assert metrics.prompt_tokens == len(prompt)
    assert metrics.completion_tokens == sampled.completion_len
    assert sampled.full_tokens[: sampled.prompt_len] == prompt
    ids = sampled.full_tokens[sampled.prompt_len :]
    return Greedy(ids, sampled.finish_reason, sampled.sampling_logprobs)


async def openai_client(url: str, tokenizer, prompt: list[int]) -> Greedy:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        reply = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            extra_body={"return_token_ids": True},
        )
    (choice,) = reply.choices
    assert choice.model_extra["prompt_token_ids"] == prompt
    return Greedy(choice.model_extra["token_ids"], choice.finish_reason, None)


async def openai_client_streaming(url: str, tokenizer, prompt: list[int]) -> Greedy:
    ids: list[int] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        async for chunk in stream:
            ids += chunk.choices[0].model_extra["token_ids"]
    assert chunk.usage.completion_tokens == len(ids)
    return Greedy(ids, chunk.choices[0].finish_reason, None)


async def our_processor(url: str, tokenizer, prompt: list[int]) -> Greedy:
    question = next(q for q in QUESTIONS if rendered(tokenizer, q) == prompt)
    record = await rolled_out(
        {"model": MODEL, "base_url": url, "temperature": 0.0, "max_tokens": MAX_TOKENS}, question
    )
    assert record.prompt_ids == prompt
    return Greedy(record.completion_ids[0], record.finish_reasons[0], record.inference_logprobs[0])


async def rolled_out(completion_params: dict, question: str) -> RolloutRecord:
    """The record of one row through `FireworksTrainingRolloutProcessor`."""
    processor = FireworksTrainingRolloutProcessor(tokenizer=str(FOLDER))
    row = EvaluationRow(messages=[Message(role="user", content=question)])
    config = RolloutProcessorConfig(
        completion_params=completion_params, mcp_config_path="", semaphore=asyncio.Semaphore(8)
    )
    try:
        [task] = processor([row], config)
        done = await task
    finally:
        await processor.acleanup()
    return RolloutRecord.from_extra(done.execution_metadata.extra)


def rendered(tokenizer, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


CLIENTS = [
    our_processor,
    eval_protocol_client,
    deployment_sampler,
    openai_client,
    openai_client_streaming,
]
"""Each takes (url, tokenizer, prompt ids) and samples greedily."""


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
async def test_every_client_gets_the_models_greedy_ids(client, url, tokenizer, prompts, greedy_ids):
    for prompt, ids in zip(prompts, greedy_ids, strict=True):
        got = await client(url, tokenizer, prompt)
        assert got.ids == ids
        assert got.finish_reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        assert got.logprobs is None or len(got.logprobs) == len(ids)


async def test_the_deployment_sampler_asks_for_n_completions_and_gets_them(url, tokenizer, prompts):
    sampler = DeploymentSampler(url, MODEL, "none", tokenizer)
    try:
        samples = await sampler.sample_with_prompt_tokens(
            prompts[0], n=4, max_tokens=MAX_TOKENS, logprobs=True
        )
    finally:
        sampler.close()
    assert len(samples) == 4
    for sample in samples:
        # At temperature 1 with full support the two are the same distribution.
        assert sample.sampling_logprobs == pytest.approx(sample.inference_logprobs, abs=1e-5)


# Logprobs against a teacher-forced forward


@torch.no_grad()
def forced_logprobs(
    model, prompt: list[int], ids: list[int], *, temperature: float, top_p: float
) -> np.ndarray:
    """[T] float64 logprobs of `ids` by one forward over prompt and completion, and the definition
    of temperature and nucleus: the fewest most probable tokens that have mass top_p."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double().numpy()
    scaled = logits[len(prompt) - 1 : -1] / temperature
    logprobs = []
    for row, token in zip(scaled, ids, strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        nucleus, mass = [], 0.0
        for candidate in np.argsort(-probabilities):
            nucleus.append(candidate)
            mass += probabilities[candidate]
            if mass >= top_p:
                break
        assert token in nucleus
        logprobs.append(np.log(probabilities[token] / probabilities[nucleus].sum()))
    return np.array(logprobs)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9)])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_over_http_equal_a_teacher_forced_forward(
    url, model, prompts, temperature, top_p, stream
):
    body = {
        "model": MODEL,
        "prompt": prompts,
        "n": 4,
        "seed": 11,
        "max_tokens": MAX_TOKENS,
        "temperature": temperature,
        "top_p": top_p,
        "logprobs": True,
        "stream": stream,
    }
    contents = sampled_contents(url, body)
    assert len(contents) == 4 * len(prompts)
    for index, content in contents.items():
        prompt = prompts[index // 4]
        ids = [entry["token_id"] for entry in content]
        np.testing.assert_allclose(
            [entry["sampling_logprob"] for entry in content],
            forced_logprobs(model, prompt, ids, temperature=temperature, top_p=top_p),
            atol=1e-5,
            rtol=0,
        )
        np.testing.assert_allclose(
            [entry["logprob"] for entry in content],
            forced_logprobs(model, prompt, ids, temperature=1.0, top_p=1.0),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("where", ["over HTTP", "in this process"])
async def test_the_processors_logprobs_equal_a_teacher_forced_forward(
    url, model, prompts, temperature, top_p, where
):
    target = {"model": MODEL, "base_url": url} if where == "over HTTP" else LOCAL
    settings = {"n": 8, "seed": 3, "temperature": temperature, "top_p": top_p, "max_tokens": 12}
    record = await rolled_out({**target, **settings}, QUESTIONS[0])
    assert len(record) == 8
    for ids, logprobs, raw in zip(
        record.completion_ids, record.inference_logprobs, record.raw_logprobs, strict=True
    ):
        forced = forced_logprobs(model, prompts[0], ids, temperature=temperature, top_p=top_p)
        np.testing.assert_allclose(logprobs, forced, atol=1e-5, rtol=0)
        forced = forced_logprobs(model, prompts[0], ids, temperature=1.0, top_p=1.0)
        np.testing.assert_allclose(raw, forced, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_seed_gives_one_record_over_http_and_in_this_process(url, stream):
    settings = {"n": 4, "seed": 9, "max_tokens": MAX_TOKENS}
    target = {"model": MODEL, "base_url": url, "stream": stream}
    served = await rolled_out({**target, **settings}, QUESTIONS[1])
    local = await rolled_out({**LOCAL, **settings}, QUESTIONS[1])
    assert served.completion_ids == local.completion_ids
    assert served.completions_text == local.completions_text
    assert served.sampling.seeds == local.sampling.seeds


def sampled_contents(url: str, body: dict) -> dict[int, list[dict]]:
    """`logprobs.content` by choice index, from a whole reply or a stream."""
    reply = httpx.post(
        f"{url}/inference/v1/completions", json=body, timeout=PATIENCE
    ).raise_for_status()
    chunks = [reply.text]
    if body["stream"]:
        chunks = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    contents: dict[int, list[dict]] = {}
    for chunk in chunks:
        for choice in json.loads(chunk)["choices"]:
            contents.setdefault(choice["index"], []).extend(choice["logprobs"]["content"])
    return contents


def test_a_seed_gives_the_same_tokens_alone_and_among_others(url, prompts):
    def texts(**fields) -> list[str]:
        body = {"model": MODEL, "max_tokens": MAX_TOKENS, "seed": 5, **fields}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status()
        return [choice["text"] for choice in reply.json()["choices"]]

    together = texts(prompt=prompts, n=8)
    for index, prompt in enumerate(prompts):
        assert texts(prompt=prompt) == together[8 * index : 8 * index + 1]
        assert texts(prompt=prompt, n=8) == together[8 * index : 8 * index + 8]
    assert len(set(together)) > len(prompts)
