"""Rows that Eval Protocol's remote processors bring back: read turn by turn, or refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft._turn_payloads import RemoteTurn, remote_segments, turn_runs
from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.rollout import fetch_payloads, read_remote_rows
from eval_protocol_rft.scoring import score_rows
from eval_protocol_rft.training import BiasedSamplingWarning, TrainingDataError, build_batch
from tests import remote_rows as remote
from tests.episodes import templates
from tests.remote_rows import ANSWER, ASKED, CALLED, RESULT, TOKENIZER, brought_back, two_traces
from tests.rollouts import TOOLS


def record_of(row: EvaluationRow, **options: Any) -> RolloutRecord:
    (read,) = read_remote_rows([row], tokenizer=TOKENIZER, **options)
    return RolloutRecord.from_extra(read.execution_metadata.extra)


def test_a_row_of_two_turns_is_one_trajectory_of_one_segment():
    row = brought_back(two_traces())
    record = record_of(row)
    assert record.trajectories == [remote.two_turns().segments()]
    assert record.episodes is not None
    (episode,) = record.episodes
    assert (episode.turns, episode.stop_reason, episode.row_messages) == (2, "done", 2)
    assert [m["role"] for m in episode.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert record.token_turn_traces == remote.two_turns().turns()
    first = remote.two_turns().turns()[0]
    assert list(record.prompt_ids) == first["prompt_ids"]
    assert [list(ids) for ids in record.completion_ids] == [first["completion_ids"]]
    assert record.sampling.model == "fireworks_ai/accounts/x/models/y"
    assert record.sampling.tokenizer == TOKENIZER.name


def test_the_row_itself_stays_as_it_was_and_its_copy_keeps_what_is_not_token_data():
    row = brought_back(two_traces(), change=lambda extra: extra.update(reward_hint=0.5))
    before = row.model_dump()
    (read,) = read_remote_rows([row], tokenizer=TOKENIZER)
    assert row.model_dump() == before
    assert read.execution_metadata.extra["reward_hint"] == 0.5
    assert "completion_token_ids" not in read.execution_metadata.extra
    assert list(read_remote_rows([read], tokenizer=TOKENIZER)) == [read]


def test_rows_of_a_prompt_group_make_the_batch_that_our_own_record_makes():
    rows = [brought_back(two_traces(), score=score) for score in (1.0, 0.0)]
    batch = build_batch(rows, tokenizer=TOKENIZER)
    dumped = [json.loads(row.model_dump_json()) for row in rows]
    again = build_batch(dumped, tokenizer=TOKENIZER)
    (segment,) = remote.two_turns().segments()
    for made in (batch, again):
        assert made.stats.groups == 1
        assert made.stats.completions == 2
        for datum in made.datums:
            np.testing.assert_array_equal(datum.input_tokens, segment.tokens[:-1])
            np.testing.assert_array_equal(datum.logprobs, segment.logprobs[1:])
            np.testing.assert_array_equal(datum.weights, segment.loss_mask[1:])
        assert [d.advantages.max() > 0 for d in made.datums] == [True, False]


def test_a_history_that_the_template_rewrites_begins_a_new_segment():
    tokenizer = templates.merging_tokenizer(templates.STRIPS_THINKING)
    talk = Conversation.start([ASKED[1]], None, tokenizer)
    talk.sampled(remote.said("<think>hm</think>41"))
    talk.append([{"role": "user", "content": "No."}])
    talk.sampled(remote.said("42"))
    assert len(talk.segments()) == 2
    first, second = talk.turns()
    kept = {"role": "assistant", "content": "<think>hm</think>41"}
    history = [ASKED[1], kept, {"role": "user", "content": "No."}]
    row = brought_back(
        [
            remote.trace([ASKED[1]], kept, first),
            remote.trace(history, {"role": "assistant", "content": "42"}, second),
        ]
    )
    (read,) = read_remote_rows([row], tokenizer=tokenizer)
    record = RolloutRecord.from_extra(read.execution_metadata.extra)
    assert record.trajectories == [talk.segments()]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "I will add."},  # stripped
        {"content": [{"type": "text", "text": "I will add.\n"}]},
        {"content": "I will add.\n" + remote.CALL, "tool_calls": None},  # no parser on the server
        {"tool_calls": [CALLED["tool_calls"][0] | {"function": {
            "name": "add", "arguments": '{"b":40.0,"a":2}'}}]},  # another client's spelling
    ],
)  # fmt: skip
def test_what_servers_and_clients_change_of_a_message_is_no_other_answer(message: dict[str, Any]):
    traces = two_traces()
    traces[1]["input"]["messages"][2] = CALLED | message
    assert record_of(brought_back(traces)).trajectories == [remote.two_turns().segments()]


def test_thinking_that_the_server_keeps_apart_or_drops_is_no_other_answer():
    talk = Conversation.start(ASKED, None, TOKENIZER)
    talk.sampled(remote.said("<think>2 and 40</think>\n42"))
    (turn,) = talk.turns()
    row = brought_back([remote.trace(ASKED, {"role": "assistant", "content": "42"}, turn)])
    record = record_of(row)
    assert record.trajectories == [talk.segments()]
    assert record.completions_text == ["<think>2 and 40</think>\n42"]
    row.messages[-1].reasoning_content = "something else"
    with pytest.raises(RecordError, match="turn 0"):
        record_of(row)


def payload(turn: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda extra: extra["assistant_turn_payloads"][turn]


def put(turn: int, key: str, place: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(extra: dict[str, Any]) -> None:
        values = extra["assistant_turn_payloads"][turn][key]
        values[place] = value
        if turn == 1:
            extra[key] = values

    return change


def without(turn: int, key: str) -> Callable[[dict[str, Any]], Any]:
    def change(extra: dict[str, Any]) -> None:
        del extra["assistant_turn_payloads"][turn][key]
        if turn == 1:
            extra.pop(key, None)

    return change


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (put(0, "completion_token_ids", 3, -1), r"turn 0: completion_token_ids\[3\] is -1"),
    (put(1, "completion_token_ids", 2, 2**31), r"turn 1: completion_token_ids\[2\] is 2147483648"),
    (put(0, "completion_token_ids", 1, None), "turn 0: completion_token_ids"),
    (put(0, "prompt_token_ids", 7, -3), r"turn 0: prompt_token_ids\[7\] is -3"),
    (put(1, "completion_logprobs", 4, math.nan), r"turn 1: completion_logprobs\[4\] is nan"),
    (put(0, "completion_logprobs", 2, 0.5), r"turn 0: completion_logprobs\[2\] is 0.5"),
    (put(0, "completion_logprobs", 2, -9999.0), r"turn 0: completion_logprobs\[2\] is -9999"),
    (lambda e: payload(0)(e)["completion_logprobs"].pop(), r"turn 0: completion_logprobs: \d+ for"),
    (
        lambda e: payload(0)(e)["completion_token_ids"].clear(),
        "turn 0: completion_token_ids is empt",
    ),
    (lambda e: payload(0)(e)["prompt_token_ids"].clear(), "turn 0: prompt_token_ids is empty"),
    (without(0, "completion_token_ids"), "turn 0: no completion_token_ids"),
    (without(1, "completion_logprobs"), "turn 1: no completion_logprobs"),
    (without(0, "prompt_token_ids"), "turn 0: no prompt_token_ids"),
    (lambda e: e["assistant_turn_payloads"].reverse(), "turn 0, an assistant message, has no pay"),
    (lambda e: e["assistant_turn_payloads"].pop(), "turn 1, an assistant message, has no payload"),
    (lambda e: e["assistant_turn_payloads"].pop(0), "turn 0, an assistant message, has no payload"),
    (lambda e: e["assistant_turn_payloads"].append(payload(1)(e)), "turn 1 is there twice"),
    (
        lambda e: e.update(assistant_turn_payloads=[]),
        "turn 0, an assistant message, has no payload",
    ),
    (lambda e: e.update(assistant_turn_payloads=7), "assistant_turn_payloads is no list"),
    (lambda e: payload(0)(e).update(assistant_turn_index="0"), "assistant_turn_index is '0'"),
    (
        lambda e: e.update(completion_token_ids=[1, 2]),
        "completion_token_ids of the row is not that",
    ),
    (lambda e: payload(0)(e).update(routing_matrices=["AQ=="]), r"turn 0: routing_matrices: 1 for"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_is_missing_truncated_doubled_or_out_of_order_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], message: str
):
    row = brought_back(two_traces(), change=change)
    with pytest.raises(RecordError, match=f"row 'row-1'.*{message}"):
        record_of(row)
    with pytest.raises(TrainingDataError, match=f"row 'row-1'.*{message}"):
        build_batch([row], tokenizer=TOKENIZER)


def test_payloads_that_eval_protocol_cannot_decode_are_missing():
    for kind, key in (("logprobs", "completion_token_ids"), ("prompt_token_ids", "prompt_token_i")):
        traces = two_traces()
        data = traces[0]["payloads"][kind]["data"]
        traces[0]["payloads"][kind]["data"] = data[: len(data) // 2]
        with pytest.raises(RecordError, match=f"turn 0: no {key}"):
            record_of(brought_back(traces))


def test_an_id_that_the_proxy_did_not_have_is_told_as_such():
    import base64
    import struct

    import zstandard

    traces = two_traces()
    body = struct.pack("<ifif", 5, -0.5, -1, -0.25)
    raw = struct.pack("<4sBBHIIQ", b"LP01", 1, 0, 0, 2, len(body), 0) + body
    packed = base64.b64encode(zstandard.ZstdCompressor().compress(raw)).decode()
    traces[1]["payloads"]["logprobs"]["data"] = packed
    with pytest.raises(RecordError, match=r"turn 1: no completion_token_ids: an id .* \(-1\)"):
        record_of(brought_back(traces))


def retried() -> list[dict[str, Any]]:
    """Turn 0 was asked for twice; the client kept the second answer."""
    traces = two_traces()
    lost = Conversation.start(ASKED, TOOLS, TOKENIZER)
    lost.sampled(remote.said("I will not."))
    (turn,) = lost.turns()
    return [remote.trace(ASKED, {"role": "assistant", "content": "I will not."}, turn), *traces]


def test_two_answers_of_one_number_are_refused_whatever_their_order():
    first, second, third = retried()
    for traces in ([first, second, third], [second, first, third], [third, second, first]):
        with pytest.raises(RecordError, match="turn 0 is there twice"):
            record_of(brought_back(traces))


def test_a_message_with_the_ids_of_another_answer_is_refused_with_the_token():
    lost, _, last = retried()  # the kept answer's own trace is gone
    with pytest.raises(RecordError, match=r"turn 0.*calls of its message.*retry"):
        record_of(brought_back([lost, last]))
    other = Conversation.start(ASKED, None, TOKENIZER)
    other.sampled(remote.said("It is 44."))
    (turn,) = other.turns()
    row = brought_back([remote.trace(ASKED, ANSWER, turn)])
    at = next(i for i, (a, b) in enumerate(
        zip(turn["completion_ids"], templates.ids_of(TOKENIZER, "It is 42."), strict=False)
    ) if a != b)  # fmt: skip
    with pytest.raises(
        RecordError,
        match=rf"turn 0: completion_token_ids\[{at}\] is not .*'It is 44.'.*'It is 42.'",
    ):
        record_of(row)


def test_a_call_with_other_arguments_or_a_missing_one_is_another_answer():
    for calls in ([], [CALLED["tool_calls"][0] | {"function": {"name": "add", "arguments": "{}"}}]):
        traces = two_traces()
        traces[1]["input"]["messages"][2] = CALLED | {"tool_calls": calls}
        with pytest.raises(RecordError, match="turn 0: "):
            record_of(brought_back(traces))


def test_a_proxy_that_gives_the_last_trace_alone_is_found_out():
    with pytest.raises(
        RecordError, match=r"turn 0, an assistant message, has no payload.*last one"
    ):
        record_of(brought_back(two_traces()[1:]))


def test_assistant_messages_of_the_row_itself_are_no_turns_where_it_says_so():
    shown = [*ASKED, {"role": "assistant", "content": "?"}, {"role": "user", "content": "Go on."}]
    talk = Conversation.start(shown, None, TOKENIZER)
    talk.sampled(remote.said("42"))
    (turn,) = talk.turns()
    row = remote.asked_row()
    row.messages = [Message(**m) for m in shown]
    back = brought_back(
        [remote.trace(shown, {"role": "assistant", "content": "42"}, turn)], row=row
    )
    with pytest.raises(RecordError, match="say so with row_messages"):
        record_of(back)
    for said in (4, lambda row: 4):
        record = record_of(back, row_messages=said)
        assert record.trajectories == [talk.segments()]
        assert record.episodes is not None
        assert record.episodes[0].row_messages == 4


def test_without_the_tokenizer_the_row_is_refused():
    row = brought_back(two_traces())
    with pytest.raises(RecordError, match=r"row 'row-1', its ids cannot be compared.*tokenizer="):
        list(read_remote_rows([row]))
    with pytest.raises(TrainingDataError, match="names no tokenizer"):
        build_batch([row])


def test_the_tokenizer_of_the_completion_params_is_used():
    row = brought_back(two_traces(), row=remote.asked_row(tokenizer="local/arithmetic"))
    with pytest.raises(RecordError, match="turn 0: "):  # which is not that of the ids
        record_of(row)


def test_rows_whose_rollout_failed_and_rows_without_payloads_pass_by():
    from eval_protocol.models import Status

    failed = brought_back(two_traces())
    failed.rollout_status = Status.rollout_internal_error("no")
    plain = remote.asked_row()
    assert list(read_remote_rows([failed, plain])) == [failed, plain]


def test_an_answer_that_was_cut_off_is_truncated_and_one_that_a_stop_string_ended_is_not():
    talk = Conversation.start(ASKED, None, TOKENIZER)
    talk.sampled(remote.said("It is 42. END", end=False))
    (turn,) = talk.turns()
    whole = {"role": "assistant", "content": "It is 42. END"}
    record = record_of(brought_back([remote.trace(ASKED, whole, turn)]))
    assert record.finish_reasons == ["length"]
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "length"
    stopped = remote.asked_row(stop=["END"])
    row = brought_back(
        [remote.trace(ASKED, {"role": "assistant", "content": "It is 42. "}, turn)], row=stopped
    )
    record = record_of(row)
    assert (record.finish_reasons, record.completions_text) == (["stop"], ["It is 42. "])


def test_at_another_temperature_it_is_said_that_the_logprobs_may_be_either_kind():
    rows = [
        brought_back(two_traces(), score=score, row=remote.asked_row(temperature=0.5))
        for score in (1.0, 0.0)
    ]
    with pytest.warns(BiasedSamplingWarning, match="does not say whether it is in them"):
        build_batch(rows, tokenizer=TOKENIZER)


def test_runs_whose_agent_asks_differently_are_one_prompt_group():
    rows = []
    for score, when in ((1.0, "noon"), (0.0, "dusk")):
        asked = [{"role": "system", "content": f"It is {when}."}, ASKED[1]]
        talk = Conversation.start(asked, None, TOKENIZER)
        talk.sampled(remote.said("42"))
        (turn,) = talk.turns()
        traces = [remote.trace(asked, {"role": "assistant", "content": "42"}, turn)]
        rows.append(brought_back(traces, score=score))
    batch = build_batch(rows, tokenizer=TOKENIZER)
    assert (batch.stats.groups, batch.stats.datums) == (1, 2)


def test_scoring_again_judges_the_whole_conversation_as_the_one_completion():
    seen = []

    def evaluate(row: EvaluationRow) -> EvaluationRow:
        seen.append([m.role for m in row.messages])
        row.evaluation_result = EvaluateResult(score=0.25, reason="-")
        return row

    for read in (False, True):
        row = brought_back(two_traces(), score=None)
        rows = list(read_remote_rows([row], tokenizer=TOKENIZER)) if read else [row]
        (scored,) = score_rows(rows, evaluate)
        assert scored.evaluation_result.score == 0.25
        batch = build_batch(
            [scored, copy.deepcopy(brought_back(two_traces()))], tokenizer=TOKENIZER
        )
        assert batch.stats.reward_mean == pytest.approx((0.25 + 1) / 2)
    assert seen == [["system", "user", "assistant", "tool", "assistant"]] * 2


def test_tools_and_result_messages_are_those_of_the_trace():
    row = brought_back(two_traces())
    assert row.tools == TOOLS
    assert row.messages[3].content == RESULT["content"]


def test_payloads_that_were_not_asked_for_can_be_fetched_later():
    traces = two_traces()
    wanted = brought_back(traces)
    late = copy.deepcopy(wanted)
    late.execution_metadata.extra = {"reward_hint": 1}
    for message in late.messages:
        message.logprobs = None
    with remote.proxy(traces) as url:
        (read,) = fetch_payloads([late], model_base_url=url)
        (dumped,) = fetch_payloads([json.loads(late.model_dump_json())], model_base_url=url)
        assert read.execution_metadata.extra == {
            **wanted.execution_metadata.extra,
            "reward_hint": 1,
        }
        assert dumped["execution_metadata"]["extra"] == read.execution_metadata.extra
        assert list(fetch_payloads([read], model_base_url="http://nobody")) == [read]
        late = copy.deepcopy(late)
        late.messages[-1].content = "It is 43."
        with pytest.raises(RecordError, match=r"row 'row-1': .* is another conversation"):
            list(fetch_payloads([late], model_base_url=url))
    assert record_of(read).trajectories == [remote.two_turns().segments()]
    with (
        remote.proxy([]) as url,
        pytest.raises(RecordError, match="row 'row-1': the proxy has nothing of rollout rollout-1"),
    ):
        list(fetch_payloads([late], model_base_url=url))


ids_of_a_part = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(st.data())
def test_segments_hold_each_sampled_id_once_behind_what_was_sent_for_it(data: st.DataObject):
    turns: list[RemoteTurn] = []
    before: list[int] = []
    for index in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["goes on", "nothing new", "begins anew", "cut"]))
        new = data.draw(ids_of_a_part)
        prompt = {"goes on": before + new, "nothing new": before, "cut": before[:-1]}.get(kind, new)
        prompt, sampled = prompt or new, data.draw(ids_of_a_part)
        turns.append(
            RemoteTurn(
                index=index,
                prompt_ids=np.array(prompt),
                completion_ids=np.array(sampled),
                logprobs=[-0.25 * (1 + index) - 0.5 * i for i in range(len(sampled))],
                routing_matrices=[f"{index}" for _ in [*prompt, *sampled]],
            )
        )
        before = prompt + sampled
    segments = remote_segments(turns)
    left = iter(turns)
    turn = next(left, None)
    for segment in segments:
        tokens = segment.tokens.tolist()
        for sampled_, start, stop in turn_runs(segment.loss_mask.tolist()):
            if not sampled_:
                continue
            assert turn is not None
            assert tokens[:start] == turn.prompt_ids.tolist()
            assert tokens[start:stop] == turn.completion_ids.tolist()
            assert segment.logprobs[start:stop].tolist() == turn.logprobs
            assert segment.routing_matrices is not None
            assert set(segment.routing_matrices[start:stop]) == {f"{turn.index}"}
            turn = next(left, None)
    assert turn is None
    # As few as can be: one begins only where the prompt is not longer than all before it, or other.
    for one, other in itertools.pairwise(segments):
        begun = other.tokens[: other.prompt_length].tolist()
        so_far = one.tokens.tolist()
        assert begun[: len(so_far)] != so_far or len(begun) == len(so_far)
