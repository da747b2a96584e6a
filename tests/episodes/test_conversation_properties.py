"""Whatever is said and sampled: ids go out and come back, and the segments are just those.

A fake model samples arbitrary ids, most of which no tokenizer would choose for their text. How
often history is rewritten is told by a rule of each template, written down here by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes._rendering import HistoryRewrittenError
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.sampling._types import Completion
from tests.episodes import templates
from tests.rollouts import TOOLS


@dataclass(frozen=True)
class Step:
    """A sampled turn, and what is said to it."""

    sampled: list[int]
    """Without the token that ends it."""
    ending: str
    """`end`: the template's; `other`: another control token; `none`: a stop string."""
    appended: list[dict[str, str]]


Rule = Callable[[list[str], list[dict[str, str]]], bool]
"""Whether a template rewrites: texts sampled since the last question, and what is appended."""


def never(said, appended):
    return False


def at_a_question_after_thinking(said, appended):
    return any("</think>" in text for text in said) and any(m["role"] == "user" for m in appended)


def when_the_system_speaks(said, appended):
    return any(m["role"] == "system" for m in appended)


def where_blanks_surround(said, appended):
    return said[-1] != said[-1].strip()


@dataclass(frozen=True)
class Family:
    make: Callable[[], LoadedTokenizer | None]
    rewrites: Rule
    end: str = templates.END
    other: str = "<|endoftext|>"
    tools: bool = False
    thought: str = "<think>\ntwo\n</think>\n\n20"


def merging(template: str, **kwargs: Any) -> Callable[[], LoadedTokenizer]:
    return lambda: templates.merging_tokenizer(template, **kwargs)


FAMILIES = {
    "appends": Family(merging(templates.APPENDS), never, tools=True),
    "appends, the end eats blanks": Family(
        merging(templates.APPENDS, ender_eats_blanks=True), never
    ),
    "strips thinking": Family(merging(templates.STRIPS_THINKING), at_a_question_after_thinking),
    "moves system": Family(merging(templates.MOVES_SYSTEM), when_the_system_speaks),
    "trims": Family(merging(templates.TRIMS), where_blanks_surround),
    "bundled": Family(templates.bundled, never, tools=True),
}
REAL = {
    "qwen2_5": Family(lambda: templates.real("qwen2_5"), never, tools=True),
    "qwen3": Family(lambda: templates.real("qwen3"), at_a_question_after_thinking, tools=True),
    "llama3_1": Family(
        lambda: templates.real("llama3_1"),
        where_blanks_surround,
        end="<|eot_id|>",
        other="<|end_of_text|>",
    ),
}
EVERY = [
    *FAMILIES,
    *(pytest.param(name, marks=pytest.mark.real_tokenizers) for name in REAL),
]


@cache
def tokenizer_of(name: str) -> LoadedTokenizer:
    tokenizer = {**FAMILIES, **REAL}[name].make()
    if tokenizer is None:
        pytest.skip(f"EP_RFT_TOKENIZERS names no folder with {name}/ (CONTRIBUTING.md)")
    return tokenizer


WORDS = st.text(st.sampled_from("tal hiner201 \n</😀é"), min_size=1, max_size=12).map(
    lambda text: f"x{text}x"
)


def steps(family: Family, tokenizer: LoadedTokenizer) -> st.SearchStrategy[list[Step]]:
    size = len(tokenizer.tokenizer)
    any_id = st.integers(0, size - 1)
    last = any_id.filter(lambda token: token not in tokenizer.special_ids)
    arbitrary = st.tuples(st.lists(any_id, max_size=12), last).map(lambda s: [*s[0], s[1]])
    plain = WORDS.map(lambda text: templates.ids_of(tokenizer, text))
    sampled = st.one_of(
        # What Qwen3 does to half-written thinking is told elsewhere.
        arbitrary.filter(lambda ids: "think>" not in tokenizer.decode(ids)),
        plain,
        st.just(templates.ids_of(tokenizer, family.thought)),
    )
    roles = ["user", "tool", "system"]
    if family is REAL["qwen2_5"] or family is REAL["qwen3"]:
        roles = ["user", "tool"]
    message = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": WORDS})
    step = st.builds(
        Step,
        sampled=sampled,
        ending=st.sampled_from(["end", "end", "end", "none", "other"]),
        appended=st.lists(message, min_size=1, max_size=3),
    )
    return st.lists(step, min_size=1, max_size=6)


def completion_of(step: Step, family: Family, tokenizer: LoadedTokenizer, turn: int) -> Completion:
    enders = {"end": [family.end], "other": [family.other], "none": []}[step.ending]
    ids = [*step.sampled, *tokenizer.tokenizer.convert_tokens_to_ids(enders)]
    logprobs = [-(turn + 1) - i / 64 for i in range(len(ids))]
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop")


def begin(data: Any, family: Family, tokenizer: LoadedTokenizer, **options: Any) -> Conversation:
    question = {"role": "user", "content": data.draw(WORDS)}
    system = {"role": "system", "content": data.draw(WORDS)}
    messages = [system, question] if data.draw(st.booleans()) else [question]
    tools = TOOLS if family.tools and data.draw(st.booleans()) else None
    return Conversation.start(messages, tools, tokenizer, **options)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_segments_are_exactly_what_went_over_the_wire(name, data):
    family, tokenizer = {**FAMILIES, **REAL}[name], tokenizer_of(name)
    episode = data.draw(steps(family, tokenizer))
    talk = begin(data, family, tokenizer)
    tools = talk._prompt.chat.tools
    wire: list[tuple[list[int], Completion]] = []
    said: list[str] = []
    splits: list[int] = []
    for turn, step in enumerate(episode):
        sent, completion = list(talk.prompt_ids), completion_of(step, family, tokenizer, turn)
        wire.append((sent, completion))
        talk.sampled(completion)
        said.append(tokenizer.decode(step.sampled))
        if turn == len(episode) - 1:
            break
        then = list(talk.append(step.appended))
        expected = templates.whole(tokenizer, talk.messages, tools)
        if step.ending == "other" or family.rewrites(said, step.appended):
            splits.append(turn + 1)
            assert then == expected
        else:
            kept = [*sent, *completion.token_ids]
            assert then[: len(kept)] == kept
            new = then[len(kept) :]
            assert new == expected[len(expected) - len(new) :]
            assert new
        if any(message["role"] == "user" for message in step.appended):
            said.clear()
    assert [rewrite.turn for rewrite in talk.rewrites] == splits
    check_segments(talk, wire, splits)


def check_segments(talk: Conversation, wire: list[tuple[list[int], Completion]], splits: list[int]):
    """Brute force: the segment of a turn is its prompt and its answer, up to the next split."""
    segments = talk.segments()
    assert len(segments) == len(splits) + 1
    bounds = [0, *splits, len(wire)]
    for segment, (first, end) in zip(segments, pairwise(bounds), strict=True):
        tokens, logprobs, mask = [], [], []
        for prompt, completion in wire[first:end]:
            assert prompt[: len(tokens)] == tokens
            new = len(prompt) - len(tokens)
            tokens = [*prompt, *completion.token_ids]
            logprobs += [0.0] * new + completion.logprobs
            mask += [0] * new + [1] * len(completion.token_ids)
        assert segment.tokens.tolist() == tokens
        assert segment.loss_mask.tolist() == mask
        assert np.array_equal(segment.logprobs, np.float32(logprobs))
        dtypes = (segment.tokens.dtype, segment.logprobs.dtype, segment.loss_mask.dtype)
        assert dtypes == (np.int64, np.float32, np.float32)
    names = ("prompt_ids", "completion_ids", "completion_logprobs")
    turns = [tuple(turn[name] for name in names) for turn in talk.turns()]
    assert turns == [(prompt, c.token_ids, c.logprobs) for prompt, c in wire]


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_under_reject_the_first_rewrite_is_an_error_that_changes_nothing(name, data):
    family, tokenizer = {**FAMILIES, **REAL}[name], tokenizer_of(name)
    episode = data.draw(steps(family, tokenizer))
    talk = begin(data, family, tokenizer, on_rewrite="reject")
    said: list[str] = []
    for turn, step in enumerate(episode):
        talk.sampled(completion_of(step, family, tokenizer, turn))
        said.append(tokenizer.decode(step.sampled))
        before = (talk.prompt_ids, talk.messages, talk.turns())
        if step.ending == "other" or family.rewrites(said, step.appended):
            with pytest.raises(
                HistoryRewrittenError, match="rewrites history after turn"
            ) as caught:
                talk.append(step.appended)
            assert caught.value.rewrite.turn == turn + 1
            assert caught.value.rewrite.kept != caught.value.rewrite.rendered
            assert (talk.prompt_ids, talk.messages, talk.turns()) == before
            break
        talk.append(step.appended)
        if any(message["role"] == "user" for message in step.appended):
            said.clear()
    assert len(talk.segments()) == 1
    assert talk.rewrites == ()


@pytest.mark.parametrize("name", ["appends", "bundled", "appends, the end eats blanks"])
@settings(max_examples=30)
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_ids_that_the_tokenizer_would_have_chosen_give_the_prompt_that_it_would_have_made(
    name, said
):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = [{"role": "user", "content": "What is 12 + 8?"}]
    talk = Conversation.start(messages, TOOLS, tokenizer) if family.tools else None
    tools = TOOLS if talk else None
    talk = talk or Conversation.start(messages, None, tokenizer)
    for answer, feedback in said:
        talk.sampled(
            completion_of(
                Step(templates.ids_of(tokenizer, answer), "end", []), family, tokenizer, 0
            )
        )
        then = talk.append([{"role": "user", "content": feedback}])
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": feedback},
        ]
        assert list(then) == templates.whole(tokenizer, messages, tools)
    assert len(talk.segments()) == 1


SPELLINGS = st.sampled_from([(", ", ": "), (",", ":"), (", ", ":"), (" , ", ": ")])


@settings(max_examples=40)
@given(turns=st.lists(st.tuples(WORDS, SPELLINGS), min_size=1, max_size=5))
def test_calls_as_fields_are_rewritten_exactly_where_the_model_spelled_them_otherwise(turns):
    tokenizer, family = tokenizer_of("appends"), FAMILIES["appends"]
    talk = Conversation.start([{"role": "user", "content": "add"}], TOOLS, tokenizer)
    otherwise = 0
    for turn, (value, separators) in enumerate(turns):
        function = {"name": "add", "arguments": {"a": value, "b": 1}}
        spelled = json.dumps(function, ensure_ascii=False, separators=separators)
        otherwise += separators != (", ", ": ")
        text = f"<tool_call>{spelled}</tool_call>"
        call = {
            "id": "c",
            "type": "function",
            "function": {"name": "add", "arguments": json.dumps(function["arguments"])},
        }
        completion = completion_of(
            Step(templates.ids_of(tokenizer, text), "end", []), family, tokenizer, turn
        )
        talk.sampled(completion, {"role": "assistant", "content": "", "tool_calls": [call]})
        talk.append([{"role": "tool", "content": "20", "tool_call_id": "c"}])
    talk.sampled(completion_of(Step([1], "end", []), family, tokenizer, 0))
    assert len(talk.rewrites) == otherwise
    assert len(talk.segments()) == otherwise + 1
