"""Whatever is said and sampled in n episodes of a row: the record holds just what went over HTTP.

A fake model behind a real server samples arbitrary ids, most of which no tokenizer would choose,
and keeps every request and reply. What belongs in the record follows from those, and from a rule
for each template, written by hand, that says where it rewrites history.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluationRow, InputMetadata, Message
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from eval_protocol_rft import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._answers import parse_tool_calls
from eval_protocol_rft.rollout._processor import RolloutError
from eval_protocol_rft.sampling._types import Failure
from tests.episodes import templates
from tests.episodes.test_conversation_properties import (
    Family,
    at_a_question_after_thinking,
    merging,
    never,
    where_blanks_surround,
)
from tests.rollouts import TOOLS, record_of_row, roll_out
from tests.serving import EOS, byte_tokenizer
from tests.stub_server import Changed, Seen, StubServer

EXAMPLES = 25
"""Each is up to twenty requests over HTTP."""
MAX_TOKENS = 160
"""More than any turn needs that is not meant to be cut off."""


def by_bytes(template: str) -> LoadedTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return LoadedTokenizer.wrap(tokenizer, "bytes")


LLAMA_CALLS = templates.TRIMS.replace(templates.START, "<|start_header_id|>")
"""By its headers a model that writes calls as Llama does."""
FAMILIES = {
    "bytes, appends": Family(lambda: by_bytes(templates.APPENDS), never, other=EOS, tools=True),
    "appends": Family(merging(templates.APPENDS), never, tools=True),
    "strips thinking": Family(merging(templates.STRIPS_THINKING), at_a_question_after_thinking),
    "trims": Family(merging(templates.TRIMS), where_blanks_surround),
    "trims, calls as Llama": Family(
        merging("{%- if tools %}{{ tools | tojson }}{% endif -%}" + LLAMA_CALLS),
        where_blanks_surround,
        tools=True,
    ),
    "bundled": Family(templates.bundled, never, tools=True),
    "qwen2_5": Family(lambda: templates.real("qwen2_5"), never, tools=True),
    "qwen3": Family(lambda: templates.real("qwen3"), at_a_question_after_thinking, tools=True),
    "llama3_1": Family(
        lambda: templates.real("llama3_1"),
        where_blanks_surround,
        end="<|eot_id|>",
        other="<|end_of_text|>",
    ),
}
SHOWS_CALLS = ("bytes, appends", "appends", "bundled", "qwen2_5", "qwen3")
"""Templates that render calls which are fields of a message."""
REAL = ("qwen2_5", "qwen3", "llama3_1")
EVERY = [
    pytest.param(name, marks=pytest.mark.real_tokenizers) if name in REAL else name
    for name in FAMILIES
]
REWRITING = [
    pytest.param(name, marks=pytest.mark.real_tokenizers) if name in REAL else name
    for name in ("strips thinking", "trims", "qwen3", "llama3_1")
]


@cache
def tokenizer_of(name: str) -> LoadedTokenizer:
    tokenizer = FAMILIES[name].make()
    if tokenizer is None:
        pytest.skip(f"EP_RFT_TOKENIZERS names no folder with {name}/ (CONTRIBUTING.md)")
    return tokenizer


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with StubServer() as running:
        yield running


# What is drawn: a row, what the model samples, and what the environment says to it.


@dataclass(frozen=True)
class Sampled:
    """One turn of the model. Its text has a tag, by which the environment knows it."""

    ids: list[int]
    """As sampled, what ends the turn included."""
    text: str
    """Of the ids without what ends the turn."""
    ending: str
    """`end`: the template's token; `other`: another control token; `stop`: a stop string; `cut`:
    the limit of tokens."""
    malformed: bool = False
    """A tool call that is none."""


@dataclass(frozen=True)
class Reply:
    messages: list[dict[str, str]]
    done: bool


@dataclass(frozen=True)
class World:
    history: list[dict[str, Any]]
    """The row's messages, arguments of tool calls as objects."""
    trailing: list[dict[str, Any]]
    """Behind them on the row; to be dropped, for it is the assistant's."""
    opening: list[dict[str, str]]
    """What every episode begins with behind them."""
    tools: list[dict[str, Any]] | None
    model: list[list[Sampled]]
    """[n][turns]"""
    environment: list[list[Reply]]
    """[n][turns] to the model's turn of the same place."""
    seed: int

    @property
    def n(self) -> int:
        return len(self.model)

    @property
    def turns(self) -> int:
        return len(self.model[0])


TAG = re.compile(r"k(\d)v(\d)q")
WORDS = st.text(st.sampled_from("tal hiner201 \n</😀é"), min_size=1, max_size=8).map(
    lambda text: f"x{text}x"
)
BLANKS = st.sampled_from(["", " ", "\n", " \n\n", "\t"])
ANYTHING = st.one_of(WORDS, BLANKS, st.text(max_size=12))
SPEECH = {"thought": "<think>\n{tag} two\n</think>\n\n20", "blanks": " {tag}\n"}
CALLS = {
    "hermes": {
        "call": '<tool_call>\n{{"name": "add", "arguments": {{"a": "{tag}"}}}}\n</tool_call>',
        "thought and call": '<think>\n{tag}\n</think>\n\n<tool_call>{{"name":"add",'
        '"arguments":{{}}}}</tool_call>',
        "malformed": "<tool_call>{{{tag}</tool_call>",
    },
    "llama": {
        "call": '{{"name": "add", "parameters": {{"a": "{tag}"}}}}',
        "malformed": '{{"name": "add", "parameters": {tag}',
    },
}


def ids_of(tokenizer: LoadedTokenizer, text: str, *, letters: bool = False) -> list[int]:
    """Ids of a text, or of its letters one by one: another spelling of the same."""
    pieces = list(text) if letters else [text]
    return [token for piece in pieces for token in templates.ids_of(tokenizer, piece)]


@st.composite
def sampled_turns(draw: Any, name: str, tools: Any, tag: str) -> Sampled:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    special = tokenizer.special_ids
    forms = {**SPEECH, **CALLS["llama" if "lama" in name else "hermes"]}
    kind = draw(st.sampled_from(["arbitrary", "words", "thought", "thought", *forms]))
    letters = draw(st.booleans())
    if kind == "arbitrary":
        # Calls and half-written thinking are drawn on purpose, with an outcome that is known.
        any_id = st.integers(0, len(tokenizer.tokenizer) - 1)
        some = st.lists(any_id, max_size=8).filter(
            lambda ids: not re.search("think|tool_call|python_tag", tokenizer.decode(ids))
        )
        before, after = draw(some), draw(some)
        ids = [*before, *ids_of(tokenizer, tag, letters=letters), *after]
        while ids[-1] in special:
            ids.pop()
    else:
        form = forms.get(kind) or "{tag}" + draw(WORDS).replace("{", "").replace("}", "")
        ids = ids_of(tokenizer, form.format(tag=tag), letters=letters)
    ending = draw(st.sampled_from(["end"] * 9 + ["stop", "other", "cut"]))
    if ending == "cut":
        ids = (ids * MAX_TOKENS)[: MAX_TOKENS + 1]
    text = tokenizer.decode(ids)
    ender = {"end": [family.end], "other": [family.other]}.get(ending, [])
    return Sampled(
        ids=[*ids, *tokenizer.tokenizer.convert_tokens_to_ids(ender)],
        text=text,
        ending="end" if ender == [family.end] else ending,
        malformed=bool(tools) and kind == "malformed",
    )


def messages_of(roles: Sequence[str], **sizes: Any) -> st.SearchStrategy[list[dict[str, str]]]:
    message = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": ANYTHING})
    return st.lists(message, **sizes)


@st.composite
def histories(draw: Any, *, calls: bool) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    if draw(st.booleans()):
        said.append({"role": "system", "content": draw(WORDS)})
    said.append({"role": "user", "content": draw(ANYTHING)})
    spoken = st.one_of(WORDS, st.just("<think>\nhm\n</think>\n\nx"))
    for uses_tool in draw(st.lists(st.booleans(), max_size=2)):
        said.append({"role": "assistant", "content": draw(spoken)})
        if uses_tool and calls:
            function = {"name": "add", "arguments": {"a": draw(ANYTHING), "b": 1}}
            call = {"id": "c0", "type": "function", "function": function}
            said[-1] |= {"content": draw(st.one_of(st.just(""), spoken)), "tool_calls": [call]}
        said.append({"role": "tool" if uses_tool else "user", "content": draw(ANYTHING)})
    return said


@st.composite
def worlds(draw: Any, name: str) -> World:
    family = FAMILIES[name]
    tools = TOOLS if family.tools and draw(st.booleans()) else None
    n, turns = draw(st.sampled_from([3, 1, 2, 4])), draw(st.sampled_from([4, 1, 2, 3, 5]))
    roles = ["user", "tool", "tool", "system"]
    reply = st.builds(
        Reply,
        messages=messages_of(roles, min_size=1, max_size=3),
        done=st.sampled_from([False] * 7 + [True]),
    )
    return World(
        history=draw(histories(calls=name in SHOWS_CALLS)),
        trailing=draw(st.sampled_from([[], [], [{"role": "assistant", "content": "old"}]])),
        opening=draw(st.one_of(st.just([]), messages_of(["user"], max_size=1))),
        tools=tools,
        model=[
            [draw(sampled_turns(name, tools, f"k{who}v{turn}q")) for turn in range(turns)]
            for who in range(n)
        ],
        environment=[[draw(reply) for _ in range(turns)] for _ in range(n)],
        seed=draw(st.integers(0, 2**31)),
    )


# Both ends of the wire.


@dataclass(frozen=True)
class Exchange:
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    seed: int


@dataclass
class Model:
    """Answers each episode with a script of its own, and keeps what went over the wire."""

    world: World
    episodes: dict[str, list[Exchange]] = field(default_factory=dict)
    """By the header that all turns of an episode share; in the order of the scripts."""
    faults: list[str] = field(default_factory=list)

    def __call__(self, seen: Seen) -> Changed:
        exchanges = self.episodes.setdefault(seen.headers["x-session-affinity"], [])
        who = list(self.episodes).index(seen.headers["x-session-affinity"])
        if who >= self.world.n or len(exchanges) >= self.world.turns:
            self.faults.append(f"episode {who}, turn {len(exchanges)}: nobody should ask")
            who, exchanges = 0, []
        sampled = self.world.model[who][len(exchanges)]
        limit = seen.body["max_tokens"]
        cut = sampled.ending == "cut" or len(sampled.ids) > limit
        ids = sampled.ids[:limit]
        rng = random.Random(f"{seen.body['seed']}/{who}/{len(exchanges)}")
        exchange = Exchange(
            prompt=list(seen.body["prompt"]),
            ids=ids,
            logprobs=[rng.choice([0.0, -rng.uniform(0, 30), -rng.random()]) for _ in ids],
            finish_reason="length" if cut else "stop",
            seed=seen.body["seed"],
        )
        exchanges.append(exchange)
        return Changed(lambda reply: _put(exchange, reply))


def _put(exchange: Exchange, reply: dict[str, Any]) -> None:
    """The exchange in place of what the server samples by itself."""
    (choice,) = reply["choices"]
    choice["finish_reason"] = exchange.finish_reason
    choice["token_ids"] = choice["raw_output"]["completion_token_ids"] = exchange.ids
    choice["logprobs"]["content"] = [
        {
            "token": "?",
            "token_id": token,
            "logprob": 1.25 * logprob,
            "sampling_logprob": logprob,
            "bytes": [63],
            "text_offset": i,
            "top_logprobs": [],
        }
        for i, (token, logprob) in enumerate(zip(exchange.ids, exchange.logprobs, strict=True))
    ]
    size = len(exchange.ids)
    prompt_tokens = reply["usage"]["prompt_tokens"]
    reply["usage"] |= {"completion_tokens": size, "total_tokens": prompt_tokens + size}


class Answering(Environment):
    """Answers the turn whose tag it is shown, and sees to it that no other episode's is among
    them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.heard: int | None = None

    def reset(self, row: EvaluationRow) -> list[dict[str, str]]:
        return self.world.opening

    def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        found = TAG.search(assistant.model_dump_json())
        assert found, assistant
        who, turn = map(int, found.groups())
        assert self.heard in (None, who), f"a turn of episode {who} among those of {self.heard}"
        self.heard = who
        reply = self.world.environment[who][turn]
        return Step(messages=reply.messages, done=reply.done)


def row_of(world: World) -> EvaluationRow:
    return EvaluationRow(
        messages=[_as_message(one) for one in [*world.history, *world.trailing]],
        tools=world.tools,
        input_metadata=InputMetadata(row_id="row"),
    )


def _as_message(message: dict[str, Any]) -> Message:
    if "tool_calls" not in message:
        return Message(**message)
    (call,) = message["tool_calls"]
    arguments = json.dumps(call["function"]["arguments"])
    spelled = {**call, "function": {**call["function"], "arguments": arguments}}
    return Message(**{**message, "tool_calls": [spelled]})


@dataclass(frozen=True)
class Outcome:
    row: EvaluationRow
    record: RolloutRecord | None
    """None where no episode survived."""
    failures: Sequence[Failure]
    episodes: list[list[Exchange]]
    """[n] in the order of the world's scripts."""


def run(server: StubServer, name: str, world: World, *, on_rewrite: Any = "split") -> Outcome:
    model = Model(world)
    server.script = model
    processor = EpisodeRolloutProcessor(
        lambda: Answering(world),
        tokenizer=tokenizer_of(name).tokenizer,
        limits=EpisodeLimits(turns=world.turns),
        on_rewrite=on_rewrite,
    )
    row = row_of(world)
    params = {
        "model": "test-model",
        "api_base": server.url,
        "max_tokens": MAX_TOKENS,
        "n": world.n,
        "seed": world.seed,
    }
    try:
        (row,) = asyncio.run(roll_out(processor, row, params))
        record = record_of_row(row)
        failures: Sequence[Failure] = record.failures
    except RolloutError as error:
        record, failures = None, error.failures
    assert model.faults == []
    assert len(model.episodes) == world.n
    return Outcome(row, record, failures, list(model.episodes.values()))


# What must have come of it.


@dataclass(frozen=True)
class Course:
    """How one episode goes where nothing is rejected."""

    stop_reason: str
    turns: int
    appended: list[list[dict[str, str]]]
    """[turns - 1]"""
    rewrites: list[int]
    """Turns sampled before each."""


def course_of(world: World, name: str, who: int) -> Course:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    # Thinking that the row has since its last question is rewritten like the model's own.
    said: list[str] = []
    for message in [*world.history, *world.opening]:
        if message["role"] == "user":
            said.clear()
        elif message["role"] == "assistant":
            said.append(message["content"])
    appended: list[list[dict[str, str]]] = []
    rewrites: list[int] = []
    for turn, (sampled, reply) in enumerate(
        zip(world.model[who], world.environment[who], strict=True)
    ):
        if sampled.ending == "cut":
            return Course("length", turn + 1, appended, rewrites)
        if sampled.malformed:
            problem = parse_tool_calls(sampled.text, tokenizer)[1]
            told = [{"role": "user", "content": problem.message}]
        elif reply.done:
            return Course("done", turn + 1, appended, rewrites)
        else:
            told = reply.messages
        if turn + 1 == world.turns:
            return Course("turns", turn + 1, appended, rewrites)
        said.append(sampled.text)
        if sampled.ending == "other" or family.rewrites(said, told):
            rewrites.append(turn + 1)
        if any(message["role"] == "user" for message in told):
            said.clear()
        appended.append(told)
    raise AssertionError("an episode has turns")


@dataclass
class Expected:
    """A segment, put together from what went over the wire."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)


def segments_of(exchanges: list[Exchange]) -> list[Expected]:
    segments: list[Expected] = []
    for exchange in exchanges:
        if not segments or exchange.prompt[: len(segments[-1].tokens)] != segments[-1].tokens:
            segments.append(Expected())
        segment = segments[-1]
        new = exchange.prompt[len(segment.tokens) :]
        segment.tokens += [*new, *exchange.ids]
        segment.logprobs += [0.0] * len(new) + exchange.logprobs
        segment.loss_mask += [0] * len(new) + [1] * len(exchange.ids)
    return segments


def check_record(record: RolloutRecord, alive: dict[int, list[Exchange]]) -> None:
    """`alive`: the exchanges of the surviving episodes, by the seed of their first request."""
    assert record.trajectories is not None
    assert sorted(record.sampling.seeds) == sorted(alive)
    for i, (seed, trajectory) in enumerate(
        zip(record.sampling.seeds, record.trajectories, strict=True)
    ):
        exchanges = alive[seed]
        expected = segments_of(exchanges)
        assert len(trajectory) == len(expected)
        for segment, wanted in zip(trajectory, expected, strict=True):
            assert segment.tokens.tolist() == wanted.tokens
            assert segment.loss_mask.tolist() == wanted.loss_mask
            assert segment.logprobs.tolist() == np.float32(wanted.logprobs).tolist()
        # Each turn ends a beginning of one segment, and all that is sampled is one of theirs.
        for exchange in exchanges:
            whole = [*exchange.prompt, *exchange.ids]
            assert any(segment.tokens[: len(whole)].tolist() == whole for segment in trajectory)
        sampled = sum(len(exchange.ids) for exchange in exchanges)
        assert sum(segment.num_sampled for segment in trajectory) == sampled
        first = exchanges[0]
        assert record.prompt_ids == first.prompt
        assert record.completion_ids[i] == first.ids
        assert record.inference_logprobs[i] == first.logprobs
    keys = ("prompt_ids", "completion_ids", "completion_logprobs", "finish_reason")
    traces = [tuple(trace[key] for key in keys) for trace in record.token_turn_traces]
    assert traces == [
        (one.prompt, one.ids, one.logprobs, one.finish_reason)
        for one in alive[record.sampling.seeds[0]]
    ]


def check_prompts(
    world: World, name: str, who: int, course: Course, exchanges: list[Exchange]
) -> None:
    """Each prompt is what was there and what the template renders behind it, or all that it
    renders where it rewrites."""
    tokenizer = tokenizer_of(name)
    end = tokenizer.tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    talk = [*world.history, *world.opening]
    assert exchanges[0].prompt == templates.whole(tokenizer, talk, world.tools)
    for turn, (before, after) in enumerate(pairwise(exchanges)):
        talk.append({"role": "assistant", "content": world.model[who][turn].text})
        talk += course.appended[turn]
        rendered = templates.whole(tokenizer, talk, world.tools)
        kept = [*before.prompt, *before.ids]
        if turn + 1 in course.rewrites:
            assert after.prompt == rendered
            assert after.prompt[: len(kept)] != kept
        else:
            assert after.prompt[: len(kept)] == kept
            new = after.prompt[len(kept) :]
            assert new
            assert new == rendered[-len(new) :]
            # Nothing is there twice: what ends a turn is in what was sampled, or in what is new.
            assert after.prompt.count(end) == rendered.count(end)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_episodes_are_exactly_what_went_over_the_wire(server, name, data):
    world = data.draw(worlds(name))
    outcome = run(server, name, world)
    record, alive = outcome.record, {}
    assert record is not None
    assert record.episodes is not None
    assert list(outcome.failures) == []
    for who, exchanges in enumerate(outcome.episodes):
        course = course_of(world, name, who)
        event(f"{len(course.rewrites)} rewrites, {course.stop_reason}")
        assert len(exchanges) == course.turns
        check_prompts(world, name, who, course, exchanges)
        assert len(segments_of(exchanges)) == 1 + len(course.rewrites)
        alive[exchanges[0].seed] = exchanges
        episode = record.episodes[record.sampling.seeds.index(exchanges[0].seed)]
        assert (episode.turns, episode.stop_reason) == (course.turns, course.stop_reason)
        rewrites = episode.metrics.get("history_rewrites", [])
        assert [one["turn"] for one in rewrites] == course.rewrites
        roles = [message["role"] for message in [*world.history, *world.opening]]
        for told in course.appended:
            roles += ["assistant", *(message["role"] for message in told)]
        assert [message["role"] for message in episode.messages] == [*roles, "assistant"]
    check_record(record, alive)


@pytest.mark.parametrize("name", REWRITING)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_under_reject_an_episode_whose_history_is_rewritten_fails_and_no_other(server, name, data):
    world = data.draw(worlds(name))
    outcome = run(server, name, world, on_rewrite="reject")
    alive, rejected = {}, []
    for who, exchanges in enumerate(outcome.episodes):
        course = course_of(world, name, who)
        if course.rewrites:
            rejected.append(course.rewrites[0])
            assert len(exchanges) == course.rewrites[0]
        else:
            alive[exchanges[0].seed] = exchanges
            assert len(exchanges) == course.turns
            assert len(segments_of(exchanges)) == 1
        check_prompts(world, name, who, course, exchanges)
    event(f"{len(rejected)} of {world.n} rejected")
    told = [
        re.match(r"turn (\d+): .* rewrites history after turn \1: ", failure.message)
        for failure in outcome.failures
    ]
    assert all(told), outcome.failures
    assert sorted(int(found[1]) for found in told if found) == sorted(rejected)
    assert {failure.kind for failure in outcome.failures} <= {"internal"}
    assert (outcome.record is None) == (not alive)
    if outcome.record is not None:
        kept = outcome.record.sampling.indices
        assert sorted([*kept, *(one.index for one in outcome.failures)]) == list(range(world.n))
        check_record(outcome.record, alive)


def thinking_world(tokenizer: LoadedTokenizer, end: str, then: list[list[dict[str, str]]]) -> World:
    """One episode per entry of `then`, which says what follows a turn with thinking in it."""

    def says(text: str) -> Sampled:
        return Sampled([*ids_of(tokenizer, text + end)], text, "end")

    call = '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 8}}\n</tool_call>'
    return World(
        history=[{"role": "user", "content": "What is 12 + 8?"}],
        trailing=[],
        opening=[],
        tools=TOOLS,
        model=[
            [
                says(f"<think>\nk{who}v0q\n</think>\n\n{call}"),
                says(f"<think>\nk{who}v1q\n</think>\n\n20"),
            ]
            for who in range(len(then))
        ],
        environment=[[Reply(told, False), Reply([], True)] for told in then],
        seed=7,
    )


@pytest.mark.real_tokenizers
@pytest.mark.parametrize("on_rewrite", ["split", "reject"])
def test_qwen3_keeps_its_thinking_at_a_tool_result_and_drops_it_at_a_question(server, on_rewrite):
    tokenizer = tokenizer_of("qwen3")
    result = {"role": "tool", "content": "20"}
    question = {"role": "user", "content": "Are you sure?"}
    world = thinking_world(tokenizer, templates.END, [[result], [question], [result, question]])

    outcome = run(server, "qwen3", world, on_rewrite=on_rewrite)

    record = outcome.record
    assert record is not None
    assert record.trajectories is not None
    by_seed = {
        seed: len(trajectory)
        for seed, trajectory in zip(record.sampling.seeds, record.trajectories, strict=True)
    }
    segments = [by_seed.get(exchanges[0].seed) for exchanges in outcome.episodes]
    turns = [len(exchanges) for exchanges in outcome.episodes]
    think = tokenizer.tokenizer.convert_tokens_to_ids("<think>")
    if on_rewrite == "split":
        assert segments == [1, 2, 2]
        assert turns == [2, 2, 2]
        thoughts = [exchanges[1].prompt.count(think) for exchanges in outcome.episodes]
        assert thoughts == [1, 0, 0]
        check_record(record, {one[0].seed: one for one in outcome.episodes})
    else:
        assert segments == [1, None, None]
        assert turns == [2, 1, 1]
        assert ["rewrites history after turn 1" in f.message for f in outcome.failures] == [
            True
        ] * 2
        check_record(record, {outcome.episodes[0][0].seed: outcome.episodes[0]})
