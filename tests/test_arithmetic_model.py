"""The bundled model: it loads from its folder alone, and leaves something to learn."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

torch = pytest.importorskip("torch")

from eval_protocol_rft.local._sampler import LocalSampler  # noqa: E402
from eval_protocol_rft.local.models import bundled_model_path  # noqa: E402
from eval_protocol_rft.sampling._types import SamplingParams  # noqa: E402

FOLDER = bundled_model_path("arithmetic")
HELD_OUT = [(a, b) for a in range(10, 100) for b in range(10, 100) if (3 * a + 5 * b) % 11 == 0]
PROBLEMS, COMPLETIONS = 200, 8


@pytest.fixture(scope="module")
def sampler():
    return LocalSampler.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer(sampler):
    return sampler.tokenizer


@pytest.fixture(scope="module")
def answers(sampler):
    """[PROBLEMS] right answer and COMPLETIONS texts at temperature 1, each with its own seed."""
    params = SamplingParams(model="arithmetic", max_tokens=16)
    problems = random.Random(0).sample(HELD_OUT, PROBLEMS)
    seeds = itertools.count()

    async def sample(a, b):
        prompt = ask(sampler.tokenizer, a, b)
        completions = await asyncio.gather(
            *(sampler.sample(prompt, params, seed=next(seeds)) for _ in range(COMPLETIONS))
        )
        return str(a + b), [completion.text for completion in completions]

    async def sample_all():
        return await asyncio.gather(*(sample(a, b) for a, b in problems))

    return asyncio.run(sample_all())


def ask(tokenizer, a, b):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{a}+{b}="}], add_generation_prompt=True, return_dict=False
    )


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


# What there is to learn


def test_a_sampled_answer_is_right_about_a_quarter_of_the_time(answers):
    rewards = [text == right for right, texts in answers for text in texts]
    assert 0.15 < sum(rewards) / len(rewards) < 0.40


def test_of_eight_answers_one_is_right_far_more_often(answers):
    first = sum(texts[0] == right for right, texts in answers)
    any_of_eight = sum(right in texts for right, texts in answers)
    assert any_of_eight > first + 0.3 * PROBLEMS


def test_wrong_answers_are_plausible_numbers(answers):
    wrong = [(int(right), text) for right, texts in answers for text in texts if text != right]
    numbers = [(right, int(text)) for right, text in wrong if text.isascii() and text.isdigit()]
    near = [number for right, number in numbers if abs(number - right) <= 20]
    assert len(numbers) > 0.95 * len(wrong)
    assert len(near) > 0.6 * len(wrong)


# The folder


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert LocalSampler.from_pretrained(FOLDER).context_length >= 2048


def test_it_is_small_and_shaped_for_vllm_on_a_cpu():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["head_dim"] == 32
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert (FOLDER / "README.md").is_file()


def test_an_unknown_name_is_not_a_bundled_model():
    assert bundled_model_path("algebra") is None


# The tokenizer and its template


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_text_survives_the_tokenizer_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert len(ids) == len(text.encode())


def test_a_question_renders_to_a_short_prompt(sampler, tokenizer):
    assert len(ask(tokenizer, 17, 25)) == 25
    (end,) = sampler.eos_token_ids
    assert tokenizer.decode([end]) == "<|im_end|>" == tokenizer.eos_token


def test_turns_render_as_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
    ]
    text = (
        "<|im_start|>system\nAdd.<|im_end|>\n"
        "<|im_start|>user\n1+1=<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert render(tokenizer, messages) == text
    assert render(tokenizer, messages, add_generation_prompt=True) == (
        text + "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Add."}]])
def test_tools_render_as_a_json_line_in_the_system_turn(tokenizer, system):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    text = render(tokenizer, [*system, {"role": "user", "content": "1+1="}], tools=tools)
    system_turn, rest = text.split("<|im_end|>\n", 1)
    *lines, tools_line = system_turn.split("\n")
    assert lines == ["<|im_start|>system", *(message["content"] for message in system)]
    assert json.loads(tools_line) == {"tools": tools}
    assert rest == "<|im_start|>user\n1+1=<|im_end|>\n"


def test_tool_calls_render_and_need_no_content(tokenizer):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    head, line, tail = render(tokenizer, [message]).split("\n", 2)
    assert (head, tail) == ("<|im_start|>assistant", "")
    assert json.loads(line.removesuffix("<|im_end|>")) == {"tool_calls": calls}


def test_content_that_is_not_text_is_an_error_and_not_dropped(tokenizer):
    parts = [{"type": "image", "image": "x"}]
    with pytest.raises(TemplateError, match="text only"):
        render(tokenizer, [{"role": "user", "content": parts}])
