"""Data to train on, in every format that prompts are read from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from eval_protocol.models import EPParameters, EvaluationRow, Message

from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.loop._data import load_rows
from eval_protocol_rft.loop._run_directory import rows_fingerprint
from eval_protocol_rft.loop._run_options import SetupError

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "1+1="}], "ground_truth": "2"},
    {
        "messages": [
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
        "ground_truth": {"answer": "3"},
        "tools": [
            {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},
            {
                "type": "function",
                "function": {"name": "at", "parameters": {"properties": {"x": {"type": "string"}}}},
            },
        ],
    },
]
PLAIN: list[dict[str, Any]] = [{**record, "ground_truth": "2"} for record in RECORDS]
"""The same with one type a column, as Parquet has it."""


def _test(**changes: Any) -> Any:
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return row

    vars(evaluator)["__ep_params__"] = EPParameters(**changes)
    return evaluator


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def _written(folder: Path, name: str) -> str:
    """`PLAIN` in the form that the name says."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(_lines(PLAIN)))
    elif name.endswith(".json"):
        path.write_text(json.dumps(PLAIN))
    elif name.endswith(".tsv"):
        texts = [
            {"messages": json.dumps(record["messages"]), "ground_truth": "2"} for record in PLAIN
        ]
        options = pa.csv.WriteOptions(delimiter="\t")
        pa.csv.write_csv(pa.Table.from_pylist(texts), path, write_options=options)
    elif name.endswith(".parquet"):
        names = dict.fromkeys(name for record in PLAIN for name in record)
        pq.write_table(
            pa.table({name: [record.get(name) for record in PLAIN] for name in names}), path
        )
    elif name == "folder":
        path.mkdir()
        for i, record in enumerate(PLAIN):
            (path / f"{i}.jsonl").write_bytes(_lines([record]))
    elif "*" in name:
        for i, record in enumerate(PLAIN):
            (path.parent / f"{i}.jsonl").write_bytes(_lines([record]))
    else:
        path.write_bytes(_lines(PLAIN))
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["data.parquet", "data.jsonl.gz", "data.json", "data.ndjson", "folder", "shards/*.jsonl"],
)
def test_rows_are_those_of_the_same_data_in_jsonl(tmp_path, name) -> None:
    expected = [EvaluationRow(**record) for record in PLAIN]
    rows = load_rows(_test(), [_written(tmp_path, name)])
    same = load_rows(_test(), [_written(tmp_path, "x.jsonl")])
    assert rows_fingerprint(rows) == rows_fingerprint(same)
    assert [row.messages for row in rows] == [row.messages for row in expected]
    assert [row.tools for row in rows] == [row.tools for row in expected]
    assert rows[0].model_fields_set == {"messages", "ground_truth"}


def test_values_of_jsonl_stay_as_they_are_written(tmp_path) -> None:
    """Also of several types in a column, and a null that somebody wrote."""
    seen: list[dict[str, Any]] = []

    def adapter(rows: list[dict[str, Any]]) -> list[EvaluationRow]:
        seen.extend(rows)
        return [EvaluationRow(messages=[Message(role="user", content="?")]) for _ in rows]

    records = [*RECORDS, {"ground_truth": None, "a": 1 << 70, "b": [1, 2.5, None]}]
    (tmp_path / "data.jsonl").write_bytes(_lines(records))
    load_rows(_test(dataset_adapter=adapter), [tmp_path / "data.jsonl"])
    assert seen == records


def test_messages_in_csv_are_json(tmp_path) -> None:
    rows = load_rows(_test(), [_written(tmp_path, "data.tsv")])
    assert [row.messages for row in rows] == [
        EvaluationRow(messages=record["messages"]).messages for record in PLAIN
    ]


def test_an_adapter_makes_rows_of_any_columns(tmp_path) -> None:
    def adapter(rows: list[dict[str, Any]]) -> list[EvaluationRow]:
        return [
            EvaluationRow(messages=[Message(role="user", content=row["question"])]) for row in rows
        ]

    (tmp_path / "good.csv").write_text("question,answer\n1+1=,2\n")
    (tmp_path / "bad.csv").write_text("problem,answer\n1+1=,2\n")
    test = _test(dataset_adapter=adapter)
    (row,) = load_rows(test, [tmp_path / "good.csv"])
    assert row.messages[0].content == "1+1="
    with pytest.raises(SetupError, match=r"bad: .* KeyError: 'question'.*problem, answer"):
        load_rows(test, [tmp_path / "bad.csv"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"messages": []}\n\n{"messages": \n', "x.jsonl:3: not a JSON object"),
        ("x.jsonl", b"", "no rows"),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user"}]}\n{"messages": 3}\n',
            "x.jsonl:2: .*a number",
        ),
        ("x.csv", b"question,answer\n1+1=,2\n", "no row has messages.*question, answer"),
        ("x.jsonl", b'{"messages": [], "ground_truth": "\xff"}\n', "x.jsonl:1: not UTF-8"),
        ("x.parquet", b"PAR1", "x.parquet cannot be read"),
        ("x.txt", b"{}\n", "not a format"),
    ],
)
def test_what_is_wrong_with_data_is_said_with_its_place(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SetupError, SourceError), match=message):
        load_rows(_test(), [tmp_path / name])


def test_environments_may_bring_the_messages(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"ground_truth": "1"}\n')
    test = _test(rollout_processor=EpisodeRolloutProcessor(SimpleNamespace))
    assert len(load_rows(test, [tmp_path / "x.jsonl"])) == 1
