"""Files for verl and TRL: read the way these read them, and made into rollouts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, write_rows
from eval_protocol_rft.data._format import (
    FileMetadata,
    metadata_of,
)
from eval_protocol_rft.record import Score
from eval_protocol_rft.training._batch import build_batch
from tests.convert_rows import (
    CALL,
    METADATA,
    PROMPTS,
    REWARD_B,
    SAMPLING,
    TOOL,
    completion,
    failure,
    files,
    loaded,
    rollouts,
    same,
)

GROUPS = (
    completion(0, 0, 1.0),
    failure(0, 1),
    completion(0, 2, 0.25, scores={"reward": Score(reward=0.25), "reward_b": Score(reward=9.0)}),
    failure(1, 0),
    completion(2, 0, finish_reason="length", truncated=True),
)


@pytest.mark.parametrize("name", ["b.parquet", "b.json"])
def test_verl_finds_its_columns_and_one_entry_per_completion(tmp_path: Path, name: str) -> None:
    source = rollouts(tmp_path / "a.parquet", *GROUPS)
    summary = convert(source, tmp_path / name, to_format="verl")
    first, second = loaded(tmp_path / name)
    assert first["data_source"] == "openai/gsm8k"
    assert first["prompt"] == [{"role": "user", "content": "q"}]
    assert first["reward_model"] == {"style": "rule", "ground_truth": "0"}
    assert first["extra_info"] == {"index": 0, "row_id": "r0"}
    assert first["responses"] == ["0.0", "0.2"]
    assert first["prompt_ids"] == [1, 2]
    assert first["response_ids"] == [[10, 5], [12, 5]]
    assert first["response_logprobs"] == [[-0.5, 0.0], [-0.5, -2.0]]
    assert first["rewards"] == [1.0, 0.25]
    assert first["rewards_b"] == [None, 9.0]
    assert second["rewards"] == [None]
    assert second["finish_reasons"] == ["length"]
    assert (summary.data_rows, summary.completions) == (2, 3)
    assert "failed completions (2) are not in the output" in summary.notes
    assert "data rows without a completion (1) are not in the output" in summary.notes


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_trl_finds_a_prompt_and_a_completion_in_each_row(tmp_path: Path, name: str) -> None:
    source = rollouts(tmp_path / "a.parquet", *GROUPS)
    summary = convert(source, tmp_path / name, to_format="trl")
    rows = loaded(tmp_path / name)
    assert [row["completion"] for row in rows] == [
        [{"role": "assistant", "content": text}] for text in ("0.0", "0.2", "2.0")
    ]
    assert {str(row["prompt"]) for row in rows} == {str([{"role": "user", "content": "q"}])}
    assert [row["reward"] for row in rows] == [1.0, 0.25, None]
    assert [row["completion_ids"] for row in rows] == [[10, 5], [12, 5], [10, 5]]
    assert [row["logprobs"] for row in rows] == [[-0.5, 0], [-0.5, -2], [-0.5, 0]]
    assert [row["prompt_ids"] for row in rows] == [[1, 2]] * 3
    assert (summary.data_rows, summary.completions) == (2, 3)
    assert summary.notes == ("failed completions (2) are not in the output",)


@pytest.mark.parametrize("kind", ["verl", "trl"])
def test_ids_behind_the_end_go_there_and_back(tmp_path: Path, kind: Any) -> None:
    past = completion(0, 0, past_end=np.array([7, 8], np.int32))
    source = rollouts(tmp_path / "a.parquet", past, completion(0, 1))
    convert(source, tmp_path / "b.parquet", to_format=kind)
    convert(tmp_path / "b.parquet", tmp_path / "c.parquet", from_format=kind, to_format="rollouts")
    first, second = RolloutDataset(tmp_path / "c.parquet")
    assert first.past_end is not None
    assert first.past_end.tolist() == [7, 8]
    assert second.past_end is None


@pytest.mark.parametrize("kind", ["verl", "trl"])
def test_a_message_has_no_field_that_no_message_uses(tmp_path: Path, kind: Any) -> None:
    with_call = completion(1, 0, prompt=PROMPTS[2], tools=[TOOL])
    source = rollouts(tmp_path / "a.parquet", completion(0, 0), with_call)
    summary = convert(source, tmp_path / "b.parquet", to_format=kind)
    plain, called = loaded(tmp_path / "b.parquet")
    assert called["prompt"][1]["tool_calls"] == [CALL]
    assert set(plain["prompt"][0]) == {
        "role", "content", "reasoning_content", "tool_calls", "tool_call_id",
    }  # fmt: skip
    assert plain["tools"] is None
    assert called["tools"].startswith('[{"type":"function"')
    assert any("verl takes tools" in note for note in summary.notes) == (kind == "verl")


@pytest.mark.parametrize("kind", ["verl", "trl"])
def test_what_is_left_out_is_said(tmp_path: Path, kind: Any) -> None:
    row = completion(
        0, 0, request_id="x", began_at=1.5, original={"level": 3, "empty": None},
        scores={"reward": Score(reward=1.0, reason="good")},
    )  # fmt: skip
    source = rollouts(tmp_path / "a.parquet", row, level=pa.int64(), empty=pa.string())
    summary = convert(source, tmp_path / "b.parquet", to_format=kind)
    level = "original_level, " if kind == "verl" else ""
    left_out = f"began_at, {level}request_id, reward_reason"
    assert summary.notes == (f"columns not in the output: {left_out}",)


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_trl_gets_the_data_sets_columns_under_their_own_names(tmp_path: Path, name: str) -> None:
    metadata = msgspec.structs.replace(
        METADATA,
        data=msgspec.structs.replace(METADATA.data, ground_truth_key="ground_truth"),
        json_columns=["original_tags"],
        rewards=dict.fromkeys(("reward", "reward_b"), REWARD_B),  # as `ep-rft score` leaves it
    )
    types = {"q": pa.string(), "level": pa.int64(), "seed": pa.string(), "tags": pa.string()}
    types["ground_truth"] = pa.string()
    values = {"q": "2+2=", "level": 3, "seed": "theirs", "tags": ["a", 1], "ground_truth": "0"}
    rows = [completion(0, i, float(i), original=values, seed=7 + i) for i in range(2)]
    source = rollouts(tmp_path / "a.parquet", *rows, metadata=metadata, **types)
    summary = convert(source, tmp_path / name, to_format="trl")
    assert summary.notes == ("column seed is original_seed", "columns of JSON text: tags")

    def by_columns(completions: Any, ground_truth: Any, level: Any, tags: Any, **more: Any) -> Any:
        assert more["q"] == ["2+2="] * 2
        assert more["original_seed"] == ["theirs"] * 2
        assert [msgspec.json.decode(text) for text in tags] == [["a", 1]] * 2
        return [int(truth) + depth for truth, depth in zip(ground_truth, level, strict=True)]

    # As GRPOTrainer passes a batch on to reward functions.
    batch = loaded(tmp_path / name)
    names = [key for key in batch[0] if key not in ("prompt", "completion", "completion_ids")]
    columns = {key: [row[key] for row in batch] for key in names}
    assert by_columns(completions=[row["completion"] for row in batch], **columns) == [3, 3]
    assert columns["seed"] == [7, 8]
    if name == "b.parquet":
        convert(tmp_path / name, tmp_path / "c.parquet", from_format="trl")
        back = RolloutDataset(tmp_path / "c.parquet")
        kept = {key: values[key] for key in ("q", "level", "seed", "tags")}
        assert [row.original for row in back] == [kept] * 2


@pytest.mark.parametrize("kind", ["trl", "sft", "dpo"])
def test_raw_text_is_text(tmp_path: Path, kind: Any) -> None:
    metadata = FileMetadata(
        prompt_kind="text", sampling=msgspec.structs.replace(SAMPLING, raw=True), rewards={}
    )
    rows = [completion(0, i, float(i), prompt="Once", response=f"upon {i}") for i in range(2)]
    source = rollouts(tmp_path / "a.parquet", *rows, metadata=metadata)
    convert(source, tmp_path / "b.parquet", to_format=kind)
    row = loaded(tmp_path / "b.parquet")[-1]
    assert row["prompt"] == "Once"
    assert row["chosen" if kind == "dpo" else "completion"] == "upon 1"
    if kind == "trl":
        convert(tmp_path / "b.parquet", tmp_path / "c.parquet")
        found = list(RolloutDataset(tmp_path / "c.parquet"))
        assert [(row.prompt, row.response) for row in found] == [
            ("Once", "upon 0"),
            ("Once", "upon 1"),
        ]


def test_columns_that_the_data_set_had_from_verl_are_passed_on(tmp_path: Path) -> None:
    info = pa.struct([("index", pa.int64()), ("split", pa.string())])
    model = pa.struct([("style", pa.string()), ("ground_truth", pa.list_(pa.string()))])
    types = {"data_source": pa.string(), "ability": pa.string()}
    types |= {"extra_info": info, "reward_model": model}
    values = {
        "data_source": "math", "ability": "algebra", "extra_info": {"index": 7, "split": "train"},
        "reward_model": {"style": "rule", "ground_truth": ["4", "four"]},
    }  # fmt: skip
    row = completion(3, 0, ground_truth=None, original=values)
    source = rollouts(tmp_path / "a.parquet", row, **types)
    summary = convert(source, tmp_path / "b.parquet", to_format="verl")
    [found] = loaded(tmp_path / "b.parquet")
    assert {name: found[name] for name in values} == values
    assert found["data_idx"] == 3
    assert summary.notes == ()
    convert(tmp_path / "b.parquet", tmp_path / "c.parquet")
    [back] = RolloutDataset(tmp_path / "c.parquet")
    assert back.ground_truth == ["4", "four"]


def test_data_source_is_what_the_user_says_or_the_files_name(tmp_path: Path) -> None:
    nameless = FileMetadata(prompt_kind="messages", sampling=SAMPLING)
    source = rollouts(tmp_path / "a.parquet", completion(0, 0), metadata=nameless)
    convert(source, tmp_path / "b.parquet", to_format="verl")
    convert(source, tmp_path / "c.parquet", to_format="verl", data_source="mine")
    assert [loaded(tmp_path / f"{name}.parquet")[0]["data_source"] for name in "bc"] == [
        "a",
        "mine",
    ]
    with pytest.raises(JobError, match="data_source is verl's"):
        convert(source, tmp_path / "d.parquet", to_format="trl", data_source="mine")


@pytest.mark.parametrize("kind", ["verl", "trl"])
@settings(max_examples=20, deadline=None)
@given(files())
def test_what_was_written_for_a_trainer_is_made_into_rollouts_again(
    tmp_path_factory: Any, kind: Any, file: Any
) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "a.parquet", *file)
    convert(folder / "a.parquet", folder / "b.parquet", to_format=kind)
    if all(row.failed for row in file[1]):
        return
    assert convert(folder / "b.parquet", folder / "c.parquet").from_format == kind
    expected = [row for row in file[1] if not row.failed]
    held = [k for k in expected[0].original if any(r.original[k] is not None for r in expected)]
    for row in expected:
        row.scores = {
            name: Score(reward=score.reward)
            for name, score in row.scores.items()
            if score.reward is not None
        }
        row.attempts = row.seconds = row.began_at = row.request_id = None
        row.original = {name: row.original[name] for name in held} if kind == "trl" else {}
        if kind == "verl":
            row.max_tokens = SAMPLING.max_tokens
    found = list(RolloutDataset(folder / "c.parquet"))
    assert len(found) == len(expected)
    assert all(map(same, found, expected))
    assert RolloutDataset(folder / "c.parquet").metadata.sampling == metadata_of(file[0]).sampling


@pytest.mark.parametrize("kind", ["verl", "trl"])
def test_what_came_back_trains_alike(tmp_path: Path, kind: Any) -> None:
    source = rollouts(tmp_path / "a.parquet", *GROUPS[:3])
    convert(source, tmp_path / "b.parquet", to_format=kind)
    convert(tmp_path / "b.parquet", tmp_path / "c.parquet")
    [a, b] = (
        build_batch(RolloutDataset(tmp_path / f"{name}.parquet").training_rows()).datums
        for name in "ac"
    )
    assert [(d.target_tokens.tolist(), d.advantages.tolist()) for d in a] == [
        (d.target_tokens.tolist(), d.advantages.tolist()) for d in b
    ]


def test_text_is_never_tokenized_again(tmp_path: Path) -> None:
    generated = {
        "data_source": ["x"],
        "prompt": [[{"role": "user", "content": "q"}]],
        "responses": [["a", "b"]],
    }
    pq.write_table(pa.table(generated), tmp_path / "verl.parquet")
    demonstrations = {
        "prompt": [[{"role": "user", "content": "q"}]],
        "completion": [[{"role": "assistant", "content": "a"}]],
    }
    pq.write_table(pa.table(demonstrations), tmp_path / "trl.parquet")
    for name in ("verl", "trl"):
        with pytest.raises(JobError, match="text is never tokenized again"):
            convert(tmp_path / f"{name}.parquet", tmp_path / "out.parquet")
    source = rollouts(tmp_path / "a.parquet", *GROUPS)
    convert(source, tmp_path / "b.json", to_format="verl")
    with pytest.raises(JobError, match="only Parquet that `ep-rft convert` wrote"):
        convert(tmp_path / "b.json", tmp_path / "out.parquet")
    convert(source, tmp_path / "c.parquet", to_format="trl")
    stripped = pq.read_table(tmp_path / "c.parquet").replace_schema_metadata(None)
    pq.write_table(stripped, tmp_path / "d.parquet")
    with pytest.raises(JobError, match="does not say how the completions were sampled"):
        convert(tmp_path / "d.parquet", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
