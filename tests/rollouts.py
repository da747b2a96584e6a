"""What tests of the processor start from: a tokenizer with a chat template, rows and a config."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from eval_protocol.models import EvaluationRow, InputMetadata, Message
from eval_protocol.pytest.types import RolloutProcessorConfig
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.sampling._types import Completion
from tests.serving import ScriptedSampler, byte_tokenizer
from tests.stub_server import StubServer, sampled

CHAT_TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>{% endif %}{% endif -%}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<|im_end|>` as the end of a turn, a chat template that shows all that a
    conversation can hold."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def rendered(text: str) -> list[int]:
    """Prompt ids of a single user message, written out by hand."""
    tokenizer = byte_tokenizer()
    return tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def text_of(ids: Sequence[int]) -> str:
    """What the stub server's ids spell: 64 is `a`, and the end of a turn is no text."""
    return "".join(chr(token + 33) for token in ids if token < 256)


def row_of(
    text: str = "hi", *more: Message, row_id: str | None = "row-1", **fields: Any
) -> EvaluationRow:
    """A row with one user message, and `more` after it."""
    return EvaluationRow(
        messages=[Message(role="user", content=text), *more],
        input_metadata=InputMetadata(row_id=row_id),
        **fields,
    )


def config_of(
    params: Mapping[str, Any] | None, *, slots: int = 64, **fields: Any
) -> RolloutProcessorConfig:
    return RolloutProcessorConfig(
        completion_params=params,  # type: ignore[arg-type] - the very object that a user wrote
        semaphore=asyncio.Semaphore(slots),
        **{"mcp_config_path": "", **fields},
    )


async def roll_out(
    processor: FireworksTrainingRolloutProcessor,
    rows: EvaluationRow | list[EvaluationRow],
    params: Mapping[str, Any],
    *,
    slots: int = 64,
) -> list[EvaluationRow]:
    """The rows after one call and a clean-up; the first error of a row is raised."""
    rows = rows if isinstance(rows, list) else [rows]
    try:
        return await asyncio.gather(*processor(rows, config_of(params, slots=slots)))
    finally:
        await processor.acleanup()


def record_of_row(row: EvaluationRow) -> RolloutRecord:
    return RolloutRecord.from_extra(row.execution_metadata.extra)


def params_for(server: StubServer, **params: Any) -> dict[str, Any]:
    """With a seed, so that the record alone tells what the server must have sampled."""
    return {"model": "test-model", "api_base": server.url, "max_tokens": 32, "seed": 20, **params}


def assert_is_what_the_server_sampled(record: RolloutRecord, *, max_tokens: int = 32) -> None:
    """Each completion is the one that belongs to its own seed, so none moved or was repaired."""
    for ids, logprobs, text, seed in zip(
        record.completion_ids,
        record.inference_logprobs,
        record.completions_text,
        record.sampling.seeds,
        strict=True,
    ):
        assert seed is not None, "give the request a seed"
        assert (ids, logprobs) == sampled(record.prompt_ids, seed, max_tokens)
        assert text == text_of(ids)


def scripted(text: str, finish_reason: str = "stop") -> ScriptedSampler:
    """A sampler that always says `text`."""
    ids = chat_tokenizer().encode(text)
    ids += [256] if finish_reason == "stop" else []
    return ScriptedSampler(
        lambda prompt, params, seed: Completion(
            token_ids=list(ids), logprobs=[-0.5] * len(ids), finish_reason=finish_reason
        )
    )
