"""Rows that hold no more than the published keys are read everywhere; and what public converters
read of a row is on ours."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluationRow, Message
from rich.console import Console

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.episodes._environment import EpisodeLimits, RetryWithFeedback
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.report._reading import read_rows as read_stored
from eval_protocol_rft.report._terminal import rollout_table
from eval_protocol_rft.scoring._scorer import score_rows
from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import TrainingDataError
from tests.rollouts import chat_tokenizer, params_for, roll_out, row_of
from tests.serving import EOS

ASKED = [{"role": "user", "content": "2+2?"}]


def published(
    row_id: str, size: int, *, result: float | None = None, **beside: Any
) -> dict[str, Any]:
    """A row as a program that knows the published contract alone writes it."""
    extra = {
        "prompt_ids": [1, 2, 3],
        "completion_ids": [[10 + i, 5] for i in range(size)],
        "inference_logprobs": [[-0.5, -0.25 * i] for i in range(size)],
        "completions_text": [f"<think>no</think>{i}" for i in range(size)],
        "truncated": [False] * (size - 1) + [True],
        "finish_reasons": ["stop"] * (size - 1) + ["length"],
    }
    return {
        "messages": [*ASKED, {"role": "assistant", "content": "<think>no</think>0"}],
        "input_metadata": {
            "row_id": row_id,
            "completion_params": {"model": "them/model", "temperature": 0.5, "n": size},
        },
        "execution_metadata": {"experiment_id": "e", "extra": {**extra, **beside}},
        "rollout_status": {"code": 100, "message": "", "details": []},
        "evaluation_result": None if result is None else {"score": result, "reason": "because"},
    }


ROWS = [
    published("many", 3, rewards=[1.0, 0.0, None], sampling="theirs", step_rewards=[1.0]),
    published("one", 1, result=0.75),
]


def contents(batch: TrainingBatch) -> list[tuple[Any, ...]]:
    return [
        (
            d.row_id,
            d.completion,
            d.input_tokens.tolist(),
            d.logprobs.tolist(),
            d.reward,
            d.truncated,
        )
        for d in batch.datums
    ]


EXPECTED = [
    ("many", 0, [1, 2, 3, 10], [0, 0, -0.5, 0], 1.0, False),
    ("many", 1, [1, 2, 3, 11], [0, 0, -0.5, -0.25], 0.0, False),
    ("one", 0, [1, 2, 3, 10], [0, 0, -0.5, 0], 0.75, True),
]


@pytest.mark.parametrize("as_objects", [False, True])
def test_datums_are_built_of_them(as_objects: bool) -> None:
    rows = [EvaluationRow.model_validate(row) for row in ROWS] if as_objects else ROWS
    batch = build_batch(rows, algorithm="reinforce")
    assert contents(batch) == EXPECTED
    assert dict(batch.dropped) == {"unscored": 1}


def test_what_their_completion_params_say_of_the_sampling_counts() -> None:
    greedy = published("a", 2, rewards=[1.0, 0.0])
    greedy["input_metadata"]["completion_params"]["temperature"] = 0
    with pytest.raises(ValueError, match="temperature=0"):
        build_batch([greedy], biased_sampling="refuse")
    cut = published("a", 2, rewards=[1.0, 0.0])
    cut["input_metadata"]["completion_params"]["top_p"] = 0.9
    with pytest.raises(ValueError, match=r"truncated support \(top_p=0.9"):
        build_batch([cut], biased_sampling="refuse")


@pytest.mark.parametrize("body", [{"top_p": 0.5}, '{"top_p": 0.5}'])
def test_what_the_body_says_of_the_sampling_counts_too(body: Any) -> None:
    rows = [published("a", 2, rewards=[1.0, 0.0])]
    rows[0]["input_metadata"]["completion_params"]["extra_body"] = body
    with pytest.raises(TrainingDataError, match=r"truncated support \(top_p=0.5"):
        build_batch(rows, biased_sampling="refuse")


def test_what_contradicts_itself_is_refused_as_in_a_record_of_ours() -> None:
    short = published("a", 2, rewards=[1.0, 0.0])
    short["execution_metadata"]["extra"]["truncated"].pop()
    with pytest.raises(TrainingDataError, match=r"row 'a': .*truncated has 1 entries for 2"):
        build_batch([short])
    positive = published("a", 2, rewards=[1.0, 0.0])
    positive["execution_metadata"]["extra"]["inference_logprobs"][1][0] = 0.5
    with pytest.raises(TrainingDataError, match="row 'a', completion 1"):
        build_batch([positive])
    without = published("a", 2, rewards=[1.0, 0.0])
    del without["execution_metadata"]["extra"]["finish_reasons"]
    with pytest.raises(TrainingDataError, match="no rollout record"):
        build_batch([without])


def test_each_completion_is_scored_and_their_answer_stays_as_they_wrote_it() -> None:
    row = EvaluationRow.model_validate(published("a", 3))

    def last(row: EvaluationRow) -> float:
        content = row.messages[-1].content
        assert isinstance(content, str)
        assert content.startswith("<think>no</think>")
        return float(content[-1])

    [scored] = score_rows([row], last)
    assert scored.execution_metadata.extra["rewards"] == [0.0, 1.0, 2.0]
    assert [d.reward for d in build_batch([scored]).datums] == [0.0, 1.0, 2.0]
    row.messages.pop()
    with pytest.raises(RecordError, match="last message is not its completion 0"):
        score_rows([row], last)


def test_the_table_of_rows_counts_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    console = Console(record=True, width=160, file=StringIO())
    console.print(rollout_table(list(read_stored(file))))
    shown = console.export_text()
    assert "2 prompts, 4 completions" in shown
    assert f"mean reward {1.75 / 3:.3f}" in shown
    assert "1 unscored" in shown
    assert "failed" not in shown
    assert "them/model, temperature 0.5" in shown


def test_they_become_a_rollout_file_and_rows_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    convert(file, tmp_path / "r.parquet")
    dataset = RolloutDataset(tmp_path / "r.parquet")
    assert [(row.reward, row.temperature, row.top_p) for row in dataset] == [
        (1.0, 0.5, None),
        (0.0, 0.5, None),
        (None, 0.5, None),
        (0.75, 0.5, None),
    ]
    for rows in (group_rows(dataset.prompt_groups()), dataset.training_rows()):
        assert contents(build_batch(rows, algorithm="reinforce")) == EXPECTED
    convert(tmp_path / "r.parquet", tmp_path / "again.jsonl", to_format="ep")
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert contents(build_batch(again, algorithm="reinforce")) == EXPECTED
    for before, after in zip(ROWS, again, strict=True):
        theirs, ours = (row["execution_metadata"].pop("extra") for row in (before, after))
        assert after == before
        assert {key: ours[key] for key in theirs if key != "sampling"} == {
            key: value for key, value in theirs.items() if key != "sampling"
        }
        assert not {"completion_results", "failures"} & set(ours)
        before["execution_metadata"]["extra"] = theirs
    for to_format, name in (("trl", "t.parquet"), ("verl", "v.parquet")):
        assert (
            convert(tmp_path / "r.parquet", tmp_path / name, to_format=to_format).completions == 4
        )


async def test_the_answers_tokens_are_told_by_assistant_message(server, processor) -> None:
    """fw-ai/cookbook's chat converter looks for the payload of each assistant message of a row, by
    its number among them."""
    shots = [Message(role="assistant", content="4"), Message(role="user", content="3+3?")]
    [row] = await roll_out(processor, row_of("2+2?", *shots), params_for(server, n=2))
    extra = row.execution_metadata.extra
    assert [message.role for message in row.messages] == ["user", "assistant"] * 2
    assert extra["assistant_turn_payloads"] == [
        {
            "assistant_turn_index": 1,
            "completion_ids": extra["completion_ids"][0],
            "completion_logprobs": extra["inference_logprobs"][0],
        }
    ]
    again = json.loads(row.model_dump_json())
    assert again["execution_metadata"]["extra"] == extra


async def test_each_turn_of_an_episode_is_told_by_assistant_message(server) -> None:
    processor = EpisodeRolloutProcessor(
        lambda: RetryWithFeedback(lambda row: 0.0),
        limits=EpisodeLimits(turns=3),
        tokenizer=chat_tokenizer(),
    )
    [row] = await roll_out(processor, row_of(), params_for(server, n=2, max_tokens=200))
    extra = row.execution_metadata.extra
    answers = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    payloads = extra["assistant_turn_payloads"]
    assert [payload["assistant_turn_index"] for payload in payloads] == list(range(len(answers)))
    assert len(answers) > 1
    tokenizer = chat_tokenizer()
    for payload, place in zip(payloads, answers, strict=True):
        said = tokenizer.decode(payload["completion_ids"]).removesuffix(EOS)
        assert said == row.messages[place].content
        assert len(payload["completion_logprobs"]) == len(payload["completion_ids"])


def test_a_rollout_file_tells_them_too(tmp_path: Path) -> None:
    from tests.data.rollout_files import write_rollouts

    write_rollouts(tmp_path / "r.parquet", [["a", "b"]])
    [row] = RolloutDataset(tmp_path / "r.parquet").evaluation_rows()
    extra = row.execution_metadata.extra
    [payload] = extra["assistant_turn_payloads"]
    assert (payload["assistant_turn_index"], payload["completion_ids"]) == (
        0,
        extra["completion_ids"][0],
    )
