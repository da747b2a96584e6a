"""An evaluator sees here what it sees behind a chat server with Eval Protocol's own processor, or
docs/parity.md says what differs and why. EP_RFT_WRITE_DOCS=1 makes this test write the page."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from eval_protocol.models import EvaluationRow, InputMetadata, Message
from eval_protocol.pytest import SingleTurnRolloutProcessor
from eval_protocol.rewards.function_calling import exact_tool_match_reward

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._answers import AnswerReader
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from tests.episodes import templates
from tests.parity.families import CALL, FAMILIES, SCENARIOS, TOOLS
from tests.parity.servers import Servers, asked, tokenizer_of
from tests.rollouts import config_of

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
FIELDS = ("content", "reasoning_content", "tool_calls", "finish_reason", "tool_call_count")
LINES = "a"
REASONS = {
    LINES: """\
Line breaks between thinking, content and calls are nobody's words: they are left out here. vLLM
  keeps them, SGLang strips all blanks.""",
    "b": """\
A chat server has no reasoning parser for a model that does not think. Here a block that the text
  begins with is thinking all the same, as it is to Eval Protocol's client (litellm) where a server
  sends no field for reasoning. `split_reasoning=False` leaves it in the content.""",
    "c": """\
A call that is malformed, or was cut off, is no call, and its text is content: a policy is not to be
  rewarded for what a parser closed for it. vLLM closes it, drops the arguments that it cannot read,
  or hands on arguments that are no JSON.""",
    "d": "Text in front of a Llama 3 call is content. vLLM drops it.",
    "e": """\
A call that was cut off is shown as it was sampled, with the finish reason `length`. vLLM shows
  nothing of it.""",
    "f": "What cannot be read stays whole. vLLM drops `[TOOL_CALLS]` from it.",
    "g": """\
Thinking that was cut off is thinking, as in vLLM's later parser of Qwen3, its parser of DeepSeek-R1
  and SGLang. Those two parsers of vLLM leave it in the content.""",
}
_THINKS_NOT = ("Qwen2.5", "Qwen3-Coder", "Llama 3.1", "Llama 3.2", "Mistral")
DIFFERENCES: dict[tuple[str, str], str] = {
    **{(name, "thinking"): "b" for name in _THINKS_NOT},
    **{(name, "thinking cut off"): "b" for name in _THINKS_NOT},
    **{(name, "thinking cut off"): "g" for name in ("Qwen3", "GLM-4.5")},
    **{(name, "broken call"): "c" for name in ("Qwen3-Coder", "gpt-oss", "DeepSeek-R1", "GLM-4.5")},
    ("Qwen3-Coder", "call cut off"): "c",
    **{(name, "call after text"): "d" for name in ("Llama 3.1", "Llama 3.2")},
    ("gpt-oss", "call cut off"): "e",
    ("DeepSeek-R1", "call cut off"): "e",
    ("Mistral", "broken call"): "f",
    ("Mistral", "call cut off"): "f",
}
"""Beyond line breaks. No more and no less than these differ."""

Seen = dict[str, Any]


def rows_of(name: str) -> list[EvaluationRow]:
    return [
        EvaluationRow(
            messages=[Message(role="user", content=asked(name, scenario))],
            tools=TOOLS,
            input_metadata=InputMetadata(row_id=f"{name}/{scenario}"),
        )
        for scenario in SCENARIOS
    ]


def seen_of(row: EvaluationRow) -> Seen:
    """What of a row this is about, with what a reward of Eval Protocol's own says of it; calls
    without their ids, which no two servers give alike."""
    message, metadata = row.messages[-1], row.execution_metadata
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    calling = {"type": "function", "function": {"name": CALL[0], "arguments": CALL[1]}}
    judged = exact_tool_match_reward(row.messages, {"tool_calls": [calling]})
    return {
        "score": judged.score,
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls,
        "finish_reason": metadata.finish_reason,
        "tool_call_count": metadata.tool_call_count,
    }


async def seen_by_evaluators() -> list[tuple[tuple[str, str], Seen, Seen]]:
    """Case, Eval Protocol's processor at the chat server, ours at the completions server."""
    tokenizers = {name: tokenizer_of(family) for name, family in FAMILIES.items()}
    server = TestServer(Servers(tokenizers).app())
    await server.start_server()
    url = str(server.make_url("/v1"))

    async def of(name: str) -> list[tuple[tuple[str, str], Seen, Seen]]:
        ours = FireworksTrainingRolloutProcessor(tokenizer=tokenizers[name])
        params = {"model": name, "api_base": url, "temperature": 1.0, "max_tokens": 512}
        theirs = {**params, "model": f"openai/{name}", "api_key": "none"}
        chat = SingleTurnRolloutProcessor()(rows_of(name), config_of(theirs))
        try:
            here = await asyncio.gather(*ours(rows_of(name), config_of(params)))
            both = zip(SCENARIOS, await asyncio.gather(*chat), here, strict=True)
            return [((name, scenario), seen_of(a), seen_of(b)) for scenario, a, b in both]
        finally:
            await ours.acleanup()

    try:
        return [case for cases in await asyncio.gather(*map(of, FAMILIES)) for case in cases]
    finally:
        await server.close()


def differing(served: Seen, ours: Seen, *, lines: bool) -> set[str]:
    """Fields that differ, with line breaks around a text counted only where `lines`."""

    def shown(field: str, seen: Seen) -> Any:
        value = seen[field]
        return value.strip("\n") if isinstance(value, str) and not lines else value

    return {field for field in FIELDS if shown(field, served) != shown(field, ours)}


def page_of(marks: dict[tuple[str, str], str]) -> str:
    reasons = [f"- **{letter}** {reason}" for letter, reason in REASONS.items()]
    rows = [
        f"| {name} | " + " | ".join(marks[name, scenario] for scenario in SCENARIOS) + " |"
        for name in FAMILIES
    ]
    return TEXT.format(
        header=" | ".join(SCENARIOS),
        line=" | ".join("---" for _ in SCENARIOS),
        rows="\n".join(rows),
        reasons="\n".join(reasons),
    )


TEXT = """\
# What an evaluator sees

An evaluator gets what it would get with Eval Protocol's `SingleTurnRolloutProcessor` in front of a
chat server that samples the same text: `content`, `reasoning_content`, `tool_calls`,
`finish_reason` and `tool_call_count`. How the message is read:
[processor](processor.md#the-assistants-message).

`tests/test_parity.py` runs both processors, makes this table, and fails when the page says
otherwise. Its chat server gives what vLLM's parsers of tool calls (hermes, qwen3_coder,
llama3_json, openai, mistral, deepseek_v3, glm45) and of reasoning (qwen3 in its first form,
deepseek_r1, glm45) give, as their sources say. `=`: all five fields are equal. A letter: they are
not, for the reason below.

| | {header} |
| --- | {line} |
{rows}

{reasons}

Everywhere:

- Arguments of a call are the JSON text that was sampled. vLLM and SGLang write it anew (blanks,
  escapes): compare arguments parsed. Arguments in tags become JSON as the schema types them.
- Ids of calls are `call_0`, `call_1`, ... (Mistral: nine letters and digits), the same every time.
- Control tokens inside a text are shown. Servers leave them out by default.
- What was cut off keeps `length`, also where it called before, as with SGLang and OpenAI. vLLM says
  `tool_calls` then.
- Without tools on the row nothing is a call, as with chat servers.
- A `</think>` that neither the text nor the prompt opened is text. vLLM's later parser of Qwen3
  takes all that is before it as thinking, and so all of an answer without one.
- A tool call that Qwen3-Coder's template has in tags ends thinking that was not closed, as in vLLM
  and SGLang. In other forms it is thought about, and not called.
"""


async def test_evaluators_see_what_a_chat_server_shows_or_the_page_says_why():
    marks, unexplained = {}, []
    for case, served, ours in await seen_by_evaluators():
        beyond = differing(served, ours, lines=False)
        if bool(beyond) != (case in DIFFERENCES):
            unexplained.append((case, beyond, served, ours))
        assert served["score"] == ours["score"] == (case[1] in ("one call", "call after text")), (
            case
        )
        letters = [LINES] if differing(served, ours, lines=True) - beyond else []
        marks[case] = " ".join([*letters, *DIFFERENCES.get(case, "")]) or "="
    assert not unexplained
    page = page_of(marks)
    if os.environ.get("EP_RFT_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "EP_RFT_WRITE_DOCS=1 pytest tests/test_parity.py writes it"
    assert set("".join(marks.values())) - {"=", " "} == set(REASONS)


REAL = {"qwen2_5": "Qwen2.5", "qwen3": "Qwen3", "llama3_1": "Llama 3.1", "gptoss": "gpt-oss"}


@pytest.mark.real_tokenizers
@pytest.mark.parametrize("folder", REAL)
async def test_real_tokenizers_and_templates_show_the_same(folder):
    tokenizer = templates.real(folder)
    if tokenizer is None or tokenizer.chat_template_hash is None:
        pytest.skip(f"EP_RFT_TOKENIZERS names no folder with {folder}/ (CONTRIBUTING.md)")
    name, small = REAL[folder], LoadedTokenizer.wrap(tokenizer_of(FAMILIES[REAL[folder]]))
    prompt = tokenizer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+3?"}],
        tools=TOOLS,
        add_generation_prompt=True,
        return_dict=False,
    )
    params = SamplingParams(model="m")
    for scenario, case in FAMILIES[name].cases.items():
        ids = templates.ids_of(tokenizer, case.text)
        if case.finish_reason == "stop":
            ender = case.ender or FAMILIES[name].ender
            ids.append(tokenizer.tokenizer.convert_tokens_to_ids(ender))
        completion = Completion(
            token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason=case.finish_reason
        )
        text = tokenizer.read(completion, params).text
        here = AnswerReader(prompt, tokenizer, tools=TOOLS).read(text)
        assert text == case.text, scenario
        assert here == AnswerReader([0], small, tools=TOOLS).read(case.text), scenario
