"""What a rollout file says of itself, and which columns it can have."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data._format import (
    METADATA_KEY,
    FileMetadata,
    FormatError,
    RewardSettings,
    SamplingSettings,
    decode_metadata,
    metadata_of,
    reward_column,
    reward_columns,
    schema,
)

METADATA = FileMetadata(
    prompt_kind="messages",
    sampling=SamplingSettings(model="m", temperature=0.7, top_p=1, top_k=0, n=8, stop=["\n"]),
    json_columns=["original_facts"],
    rewards={"reward_format": RewardSettings(evaluator="e.py", fingerprint="ab")},
)


def test_a_schema_says_what_its_file_is():
    made = schema(METADATA, {"level": pa.int64()})
    assert metadata_of(made) == METADATA
    assert made.field("original_level").type == pa.int64()
    assert pa.types.is_list(made.field("prompt").type)
    assert schema(FileMetadata(), {}).field("prompt").type == pa.string()
    assert {"reward", "metrics", "reward_format", "reward_format_metrics"} <= set(made.names)


def test_metadata_is_json_that_anyone_can_read():
    values = json.loads(schema(METADATA, {}).metadata[METADATA_KEY])
    assert values["schema_version"] == 2
    assert values["sampling"]["temperature"] == 0.7
    assert values["json_columns"] == ["original_facts"]


def test_fields_of_later_packages_do_not_disturb():
    values = {**json.loads(METADATA.encode()), "further": {"a": 1}}
    assert decode_metadata(json.dumps(values).encode(), where="x") == METADATA


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (None, "a.parquet: no rollout file"),
        (b"{", "a.parquet: broken metadata"),
        (b"[]", "a.parquet: broken metadata"),
        (b"\xff", "a.parquet: broken metadata"),
        (b"{}", "a.parquet: broken metadata"),
        (b'{"schema_version": 3}', "a.parquet: schema version 3, this package reads 1 and 2"),
        (b'{"schema_version": 1, "rewards": 3}', "a.parquet: broken metadata"),
    ],
)
def test_a_file_that_says_something_else_is_refused(data: bytes | None, complaint: str):
    with pytest.raises(FormatError, match=complaint):
        decode_metadata(data, where="a.parquet")


@given(st.lists(st.text("abc_reasonmetricserror", max_size=12), unique=True))
def test_reward_names_never_make_two_columns_of_one_name(names: list[str]):
    columns = []
    for name in names:
        try:
            columns.append(reward_column(name))
        except FormatError:
            continue
    rewards = {column: RewardSettings(evaluator="e", fingerprint="f") for column in columns}
    made = schema(FileMetadata(rewards=rewards), {}).names
    assert len(set(made)) == len(made)
    assert all(column in made for name in rewards for column in reward_columns(name))


@pytest.mark.parametrize("name", ["", "a b", "ü", "error", "a_reason", "a_metrics", "x-y"])
def test_a_name_that_cannot_be_a_column_is_refused(name: str):
    with pytest.raises(FormatError, match="cannot name a reward"):
        reward_column(name)


def test_the_main_reward_needs_no_name():
    assert reward_column(None) == reward_column("reward") == "reward"
    assert reward_column("format") == "reward_format"


def test_types_that_parquet_has_not_are_the_nearest_without_loss_or_refused():
    types = {"at": pa.timestamp("s"), "all": pa.list_(pa.time32("s"))}
    made = schema(FileMetadata(), types, ground_truth=pa.timestamp("s", "UTC"))
    assert made.field("original_at").type == pa.timestamp("ms")
    assert made.field("original_all").type == pa.list_(pa.time32("ms"))
    assert made.field("ground_truth").type == pa.timestamp("ms", "UTC")
    with pytest.raises(FormatError, match="column 'nothing' is struct<>, which Parquet cannot"):
        schema(FileMetadata(), {"nothing": pa.struct([])})
