"""Turns of nine families of models that a proxy brought back, with what vLLM serves of them."""

from __future__ import annotations

from typing import Any

import pytest

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.rollout import read_remote_rows, render_chat
from tests.parity.families import FAMILIES, SCENARIOS, TOOLS, Case
from tests.parity.servers import tokenizer_of
from tests.test_parity import DIFFERENCES

READ_ALIKE = {"b", "d", "g"}
"""Of the differences to vLLM that docs/parity.md names, those that are another reading of the same
ids, and no call that vLLM made of what is none."""
ASKED = {"role": "user", "content": "q"}


def row_of(name: str, tokenizer: LoadedTokenizer, case: Case, served: Case) -> dict[str, Any]:
    """A row of one turn: the ids of one case, and the message of another."""
    ids = tokenizer.encode(case.text)
    if case.finish_reason == "stop":
        ender = case.ender or FAMILIES[name].ender
        ids.append(tokenizer.tokenizer.convert_tokens_to_ids(ender))
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": called, "arguments": text}}
        for i, (called, text) in enumerate(served.served.calls)
    ]
    message = {"role": "assistant", "content": served.served.content, "tool_calls": calls or None}
    payload = {
        "assistant_turn_index": 0,
        "prompt_token_ids": list(render_chat([ASKED], TOOLS, tokenizer, {})),
        "completion_token_ids": ids,
        "completion_logprobs": [-0.5] * len(ids),
    }
    return {
        "messages": [ASKED, message],
        "tools": TOOLS,
        "input_metadata": {"row_id": "r", "completion_params": {"model": name}},
        "execution_metadata": {"extra": {"assistant_turn_payloads": [payload]}},
    }


def said(case: Case) -> tuple[str, tuple[tuple[str, str], ...]]:
    return (case.served.content or "").strip(), case.served.calls


def is_read(row: dict[str, Any], tokenizer: LoadedTokenizer) -> bool:
    try:
        list(read_remote_rows([row], tokenizer=tokenizer))
    except RecordError as error:
        assert str(error).startswith("row 'r', turn 0: ")  # noqa: PT017 - of what was refused
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_chat_server_shows_of_the_ids_is_read_and_what_it_shows_of_others_is_not(name: str):
    tokenizer = LoadedTokenizer.wrap(tokenizer_of(FAMILIES[name]), name)
    cases = FAMILIES[name].cases
    for scenario in SCENARIOS:
        difference = DIFFERENCES.get((name, scenario))
        own = is_read(row_of(name, tokenizer, cases[scenario], cases[scenario]), tokenizer)
        if difference is None or difference in READ_ALIKE:
            assert own, scenario
        # A server may also have a parser of thinking for a model that does not think.
        without_thinking = cases[scenario].text.rpartition("</think>")[2].strip(), ()
        for other in SCENARIOS:
            if said(cases[other]) not in (said(cases[scenario]), without_thinking):
                row = row_of(name, tokenizer, cases[scenario], cases[other])
                assert not is_read(row, tokenizer), (scenario, other)


def test_rows_that_are_refused_can_be_told_and_left_out():
    tokenizer = LoadedTokenizer.wrap(tokenizer_of(FAMILIES["Qwen3"]), "Qwen3")
    first, second = list(FAMILIES["Qwen3"].cases.values())[:2]
    good, bad = (row_of("Qwen3", tokenizer, first, served) for served in (first, second))
    told: list[tuple[Any, str]] = []
    read = read_remote_rows(
        [bad, good, bad],
        tokenizer=tokenizer,
        on_refused=lambda row, error: told.append((row, str(error)[:15])),
    )
    assert [one["messages"] for one in read] == [good["messages"]]
    assert told == [(bad, "row 'r', turn 0")] * 2
