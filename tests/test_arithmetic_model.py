"""The bundled model is small, loads anywhere, and adds badly enough to have something to learn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_protocol_rft.models import bundled_model_path
from eval_protocol_rft.sampling.local import load_local_sampler
from eval_protocol_rft.sampling.types import SamplingParams

FOLDER = Path(str(bundled_model_path("arithmetic")))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_a_small_download_that_vllm_serves_too():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    assert model.config.head_dim in (32, 64, 80, 96, 112, 128)
    assert model.config.max_position_embeddings >= 256


def test_its_tokenizer_loses_nothing(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n\u00e9\u65e5\U0001f600"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_its_chat_template_renders_turns_and_tools(tokenizer):
    chat = [{"role": "user", "content": "1+2="}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with_tools = tokenizer.apply_chat_template(
        chat, tools=[tool], add_generation_prompt=True, tokenize=False
    )
    assert json.dumps(tool["function"]["name"]) in with_tools
    assert with_tools.endswith(text)


async def test_it_is_right_about_a_quarter_of_the_time_and_more_often_in_eight_tries(tokenizer):
    sampler = load_local_sampler("arithmetic")
    problems = [(a, b) for a in range(12, 99, 9) for b in range(13, 99, 8)]
    params = SamplingParams(model="arithmetic", max_tokens=8)

    async def rewards(a: int, b: int) -> list[bool]:
        chat = [{"role": "user", "content": f"{a}+{b}="}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        completions = await asyncio.gather(
            *(sampler.sample(prompt, params, seed=seed) for seed in range(8))
        )
        return [completion.text == str(a + b) for completion in completions]

    groups = await asyncio.gather(*(rewards(a, b) for a, b in problems))
    single = sum(map(sum, groups)) / (8 * len(groups))
    any_of_eight = sum(map(any, groups)) / len(groups)
    assert 0.15 < single < 0.40
    assert any_of_eight > single + 0.3
