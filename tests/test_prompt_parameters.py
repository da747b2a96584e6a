"""Settings that chat servers give to the chat template reach it here, or are refused by name: a
request whose prompt is ids would carry them for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._generate import generate
from eval_protocol_rft.episodes._environment import RetryWithFeedback
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._prompts import PromptError, render_chat
from tests.data.servers import write_jsonl
from tests.rollouts import chat_tokenizer, params_for, record_of_row, roll_out, row_of
from tests.stub_server import StubServer

TEMPLATE = (
    "{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif -%}"
    "Reasoning: {{ reasoning_effort }}."
    "{% for message in messages %} {{ message.role }}: {{ message.content }}.{% endfor %}"
    "{% if add_generation_prompt %}{% generation %} assistant:{% endgeneration %}{% endif %}"
)
"""As gpt-oss's sets the effort that nobody gave."""
ASKED = "Reasoning: high. user: hi. assistant:"


def thinking_tokenizer() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def processor_of(kind: str) -> FireworksTrainingRolloutProcessor:
    if kind == "episodes":
        return EpisodeRolloutProcessor(
            lambda: RetryWithFeedback(lambda row: 1.0), tokenizer=thinking_tokenizer()
        )
    return FireworksTrainingRolloutProcessor(tokenizer=thinking_tokenizer())


@pytest.mark.parametrize("where", ["beside", "in extra_body"])
@pytest.mark.parametrize("kind", ["completions", "episodes"])
def test_the_reasoning_effort_is_in_the_prompt_and_not_in_the_body(kind: str, where: str) -> None:
    effort: dict[str, Any] = {"reasoning_effort": "high"}
    with StubServer() as server:
        params = params_for(server, **(effort if where == "beside" else {"extra_body": effort}))
        (row,) = asyncio.run(roll_out(processor_of(kind), row_of(), params))
    record = record_of_row(row)
    assert chat_tokenizer().decode(record.prompt_ids) == ASKED
    assert record.sampling.chat_template_kwargs == effort
    assert not any("reasoning_effort" in seen.body for seen in server.requests)
    assert [list(seen.prompt) for seen in server.requests[:1]] == [record.prompt_ids]


def test_generate_renders_it_too(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "hi"}])
    with StubServer() as server:
        params = params_for(server, extra_body={"reasoning_effort": "high"})
        generate(data, tmp_path / "out.parquet", params, tokenizer=thinking_tokenizer())
    (row,) = RolloutDataset(tmp_path / "out.parquet").rows()
    assert chat_tokenizer().decode(row.prompt_ids) == ASKED


def test_what_a_template_does_not_read_is_refused_and_what_it_reads_is_named() -> None:
    tokenizer = LoadedTokenizer.wrap(thinking_tokenizer(), "tok")
    with pytest.raises(
        PromptError,
        match=r"template of 'tok' does not read enable_thinking,.*This template reads "
        "reasoning_effort$",
    ):
        render_chat(
            [{"role": "user", "content": "hi"}], None, tokenizer, {"enable_thinking": False}
        )
    named = chat_tokenizer()
    named.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}{{ effort }}"}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    chat = [{"role": "user", "content": "hi"}]
    ids = render_chat(chat, tools, LoadedTokenizer.wrap(named, "tok"), {"effort": "low"})
    assert chat_tokenizer().decode(list(ids)).endswith("low")
    with pytest.raises(PromptError, match=r"does not read effort,.*reads no such variable$"):
        render_chat(chat, None, LoadedTokenizer.wrap(named, "tok"), {"effort": "low"})
