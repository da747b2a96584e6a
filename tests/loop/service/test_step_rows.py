"""Text back to tokens: every assistant turn behind its prompt, to the end of the turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.loop.service.control._step_rows import (
    StepError,
    end_ids,
    prompt_group,
    turns_to_segments,
    with_template,
)
from tests.loop.service.text_rows import sums_row
from tests.service import arithmetic_base

REWRITING = (
    "{%- for message in messages -%}"
    "{{ message.role }}:"
    "{{ message.content if loop.last or message.role != 'assistant' else '...' }}<|im_end|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)
"""Keeps of earlier answers only that there were any, as templates do with earlier reasoning."""


def ends() -> frozenset[int]:
    return end_ids(arithmetic_base().tokenizer, arithmetic_base().module)


def rendered(messages: list[dict[str, Any]]) -> list[int]:
    """All of it by the tokenizer alone, up to the last end of turn."""
    tokenizer: Any = arithmetic_base().tokenizer
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


CONTENT = st.text(alphabet="0123456789+=- ", min_size=1, max_size=8).filter(lambda t: t.strip())
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


@given(TURNS)
def test_a_conversation_is_one_segment_as_the_template_writes_it(
    turns: list[tuple[str, str]],
) -> None:
    tokenizer = with_template(arithmetic_base().tokenizer, None)
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    (segment,) = turns_to_segments(messages, None, tokenizer, ends())
    assert segment.tokens.tolist() == rendered(messages)
    sampled, turn_ids = [], []
    for token, trained in zip(segment.tokens.tolist(), segment.loss_mask, strict=True):
        if trained:
            turn_ids.append(token)
        if trained and token in ends():
            sampled.append(turn_ids)
            turn_ids = []
    assert not turn_ids
    assert [tokenizer.decode(ids[:-1]) for ids in sampled] == [answer for _, answer in turns]


def test_a_template_that_rewrites_earlier_turns_makes_segments_of_them() -> None:
    tokenizer = with_template(arithmetic_base().tokenizer, REWRITING)
    messages = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
    ]
    first, second = turns_to_segments(messages, None, tokenizer, ends())
    assert tokenizer.decode(first.tokens.tolist()).endswith("2<|im_end|>")
    assert second.num_sampled == 2  # the last answer and its end
    assert tokenizer.decode(second.tokens[second.loss_mask > 0].tolist()) == "4<|im_end|>"


def test_tool_calls_are_trained_as_the_template_writes_them() -> None:
    tokenizer = with_template(arithmetic_base().tokenizer, None)
    call = {"name": "add", "arguments": '{"a": 1}'}
    messages = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    segments = turns_to_segments(messages, None, tokenizer, ends())
    trained = [tokenizer.decode(s.tokens[s.loss_mask > 0].tolist()) for s in segments]
    assert '"add"' in trained[0]
    assert trained[-1].endswith("2<|im_end|>")


def test_rewards_are_of_the_named_evals() -> None:
    tokenizer = with_template(arithmetic_base().tokenizer, None)
    samples = sums_row(1, 2, (0, 1))["samples"]
    for sample in samples:
        sample["evals"] = {"score": 1.0, "length": 4.0}
    group = prompt_group(1, samples, tokenizer, ends(), {"score": 1.0, "length": -0.5})
    np.testing.assert_array_equal(group.rewards, [-1.0, -1.0])
    np.testing.assert_array_equal(prompt_group(1, samples, tokenizer, ends(), {}).rewards, [5, 5])
    with pytest.raises(StepError, match=r"row 1, samples\[0\].*'other'"):
        prompt_group(1, samples, tokenizer, ends(), {"other": 1.0})


def test_a_row_that_cannot_be_rendered_is_named() -> None:
    tokenizer = with_template(arithmetic_base().tokenizer, None)
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    samples = sums_row(1, 2, (0,))["samples"]
    samples[0]["messages"][0]["content"] = [image]
    with pytest.raises(StepError, match=r"row 7, samples\[0\]"):
        prompt_group(7, samples, tokenizer, ends(), {})
