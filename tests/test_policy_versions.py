"""Which weights sampled a completion, and that one whose sampling spans two versions is marked.

A stream is taken apart here by hand: one event per token, each with the model that drew it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._types import Completion, SamplingParams, TokenIds
from eval_protocol_rft.training._prompt_groups import group_rows
from tests.rollouts import params_for, record_of_row, roll_out, row_of, scripted
from tests.stub_server import Seen, Status, reply_to, sampled
from tests.training_rows import scored

PROMPT = TokenIds([1, 2, 3])
PARAMS = SamplingParams(model="m", max_tokens=64)


def token(index: int, token_id: int, logprob: float, model: str | None, at: int) -> dict[str, Any]:
    entry = {
        "token_id": token_id,
        "logprob": logprob,
        "sampling_logprob": logprob,
        "text_offset": at,
    }
    text = chr(token_id + 33) if token_id < 256 else ""
    choice = {"index": index, "text": text, "logprobs": {"content": [entry]}}
    return {"id": "c", "object": "text_completion", "model": model, "choices": [choice]}


def end(index: int, model: str | None) -> dict[str, Any]:
    choice = {"index": index, "text": "", "finish_reason": "stop", "logprobs": None}
    return {"id": "c", "object": "text_completion", "model": model, "choices": [choice]}


def sse(events: Sequence[dict[str, Any]]) -> bytes:
    lines = [json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def streamed(*models: str | None, last: str | None = None) -> Completion:
    """A stream whose i-th token is drawn by the i-th of `models`, and whose end names `last`."""
    events = [token(0, 64 + i, -0.5, model, i) for i, model in enumerate(models)]
    [completion] = decode_stream(sse([*events, end(0, last)]), PROMPT, PARAMS)
    assert completion.token_ids == [64 + i for i in range(len(models))]
    return completion


@pytest.mark.parametrize(
    ("models", "version", "first"),
    [
        (["m@v1", "m@v1"], "v1", None),
        (["m@v1", "m@v1", "m@v2"], "v2", "v1"),
        (["m@v1", "m@v2", "m@v3"], "v3", "v1"),
        (["m@v1", "m@v2", "m@v1"], "v1", "v2"),
        (["m", "m@v1"], "v1", "m"),
        (["m@v1", "m"], None, "v1"),
        ([None, "m@v1", None], "v1", None),
        (["m", "m"], None, None),
        ([None], None, None),
    ],
)
def test_a_stream_tells_the_last_version_and_the_first_other_one(models, version, first):
    completion = streamed(*models)
    assert (completion.policy_version, completion.first_policy_version) == (version, first)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_a_completion_is_marked_exactly_where_not_all_tokens_are_of_one_version(drawn):
    completion = streamed(*(f"m@v{version}" for version in drawn))
    assert completion.policy_version == f"v{drawn[-1]}"
    assert (completion.first_policy_version is not None) == (len(set(drawn)) > 1)
    assert completion.first_policy_version in {None, *(f"v{version}" for version in drawn)}


def test_an_event_without_tokens_is_not_of_the_version_that_it_names():
    completion = streamed("m@v1", "m@v1", last="m@v2")
    assert (completion.policy_version, completion.first_policy_version) == ("v1", None)


def test_each_choice_of_a_stream_has_versions_of_its_own():
    events = [
        token(0, 64, -0.5, "m@v1", 0),
        token(1, 65, -0.5, "m@v1", 0),
        end(0, "m@v1"),
        token(1, 66, -0.5, "m@v2", 1),
        end(1, "m@v2"),
    ]
    first, second = decode_stream(sse(events), PROMPT, PARAMS, n=2)
    assert (first.policy_version, first.first_policy_version) == ("v1", None)
    assert (second.policy_version, second.first_policy_version) == ("v2", "v1")


def test_a_whole_reply_tells_one_version():
    whole = reply_to({"prompt": list(PROMPT), "max_tokens": 64, "model": "m@v7"}, 1)
    [completion] = decode_reply(json.dumps(whole).encode(), PROMPT, PARAMS)
    assert (completion.policy_version, completion.first_policy_version) == ("v7", None)


def test_what_a_server_says_under_our_own_names_is_not_believed():
    whole = reply_to({"prompt": list(PROMPT), "max_tokens": 64, "model": "m@v7"}, 1)
    whole |= {"models": {"0": ["m@v1"]}, "first_policy_version": "v1"}
    whole["choices"][0] |= {"models": ["m@v1"], "first_policy_version": "v1"}
    [completion] = decode_reply(json.dumps(whole).encode(), PROMPT, PARAMS)
    assert completion.first_policy_version is None


def swapping(seen: Seen) -> Status:
    """The even seeds are streamed while the weights change in their midst, the odd ones are not."""
    ids, logprobs = sampled(seen.prompt, seen.seed, seen.body["max_tokens"])
    events = [
        token(0, ids[i], logprobs[i], f"m@v{2 if seen.seed % 2 or i >= 1 else 1}", i)
        for i in range(len(ids))
    ]
    return Status(200, sse([*events, end(0, "m@v2")]))


async def test_a_swap_in_the_midst_of_a_stream_is_in_the_record(server, processor):
    server.script = swapping
    row = row_of()
    await roll_out(processor, row, params_for(server, n=6, stream=True))
    sampling = record_of_row(row).sampling
    assert {seed % 2 for seed in sampling.seeds} == {0, 1}
    assert sampling.policy_versions == ["v2"] * 6
    assert sampling.first_policy_versions == [None if seed % 2 else "v1" for seed in sampling.seeds]


async def test_a_record_without_such_completions_has_an_empty_list(processor):
    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from tests.rollouts import chat_tokenizer

    own = FireworksTrainingRolloutProcessor(sampler=scripted("4"), tokenizer=chat_tokenizer())
    row = row_of()
    await roll_out(own, row, {"model": "m", "n": 2})
    assert record_of_row(row).sampling.first_policy_versions == []


def test_a_record_of_before_reads_and_one_that_contradicts_itself_does_not():
    extra = scored("a", 1.0, 0.0)["execution_metadata"]["extra"]
    assert "first_policy_versions" not in extra["sampling"]
    assert RolloutRecord.from_extra(extra).sampling.first_policy_versions == []
    extra["sampling"]["first_policy_versions"] = ["v1"]
    with pytest.raises(RecordError, match=r"first_policy_versions has 1 entries, not 2 or none"):
        RolloutRecord.from_extra(extra)


def test_training_knows_which_completions_span_versions():
    row = scored("a", 1.0, 0.0, versions=["v2", "v2"], first_policy_versions=["v1", None])
    [group] = group_rows([row, scored("a", 0.5)])
    assert [t.first_policy_version for t in group.trajectories] == ["v1", None, None]
