"""Ground truths and names of rows, wherever a data set holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data import RolloutDataset
from tests.data.servers import at, refused, rows_by_pair, succeed, write_jsonl
from tests.stub_server import StubServer

VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"what is {i}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"split": "train", "index": 10 + i},
    }
    for i in range(3)
]
GSM8K = [
    {"question": f"what is {i}?", "answer": f"It is 1 + {i} #### no, wait\n#### {i},000"}
    for i in range(1, 4)
]


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    if form == "jsonl":
        return write_jsonl(folder / "d.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


class Command:
    """`generate` from the server, in a folder."""

    def __init__(self, folder: Path, server: StubServer, tokenizer: Path) -> None:
        self.folder, self.server = folder, server
        self.output = folder / "o.parquet"
        self._at = at(server, tokenizer)

    def arguments(self, data: Path, *flags: object) -> list[object]:
        return ["generate", data, "-o", self.output, *self._at, *flags]

    def run(self, data: Path, *flags: object) -> str:
        return succeed(*self.arguments(data, *flags)).stderr

    def refused(self, data: Path, *flags: object) -> str:
        said = refused(*self.arguments(data, *flags))
        assert not self.server.requests
        return said

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in rows_by_pair(self.output).values()]


@pytest.fixture
def command(tmp_path: Path, server: StubServer, tokenizer_folder: Path) -> Command:
    return Command(tmp_path, server, tokenizer_folder)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("rows", "shape", "key", "truths"),
    [
        (VERL, "verl's", "reward_model.ground_truth", ["0", "1", "2"]),
        (GSM8K, "GSM8K's", "answer####", ["1000", "2000", "3000"]),
    ],
    ids=["verl", "gsm8k"],
)
def test_a_known_shape_is_recognised_and_told(rows, shape, key, truths, form, command) -> None:
    said = command.run(write(command.folder, form, rows))
    assert f"the data set has {shape} shape: the ground truth is taken from '{key}'" in said
    assert command.column("ground_truth") == truths
    read = [row.ground_truth for row in RolloutDataset(command.output).evaluation_rows()]
    assert read == truths
    data = RolloutDataset(command.output).metadata.data
    assert data is not None
    assert data.ground_truth_key == key


@pytest.mark.parametrize(
    "odd",
    [
        [*GSM8K, {"question": "x", "answer": "no mark"}],
        [*GSM8K, {"question": "x", "answer": "#### "}],
        [*GSM8K, {"question": "x", "answer": None}],
        [{"problem": row["question"], "answer": row["answer"]} for row in GSM8K],
        [*VERL, {**VERL[0], "reward_model": None}],
        [{**row, "reward_model": {"style": "rule"}} for row in VERL],
        [{**row, "reward_model": "a text"} for row in VERL],
    ],
    ids=["no mark", "nothing behind it", "null", "other name", "a null", "no field", "text"],
)
def test_what_is_not_wholly_of_a_shape_is_not_guessed_at(odd, command) -> None:
    assert "shape" not in command.run(write(command.folder, "jsonl", odd))
    assert set(command.column("ground_truth")) == {None}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_path_leads_into_objects_and_keeps_its_type(form, command) -> None:
    data = write(command.folder, form, VERL)
    assert "shape" not in command.run(data, "--ground-truth-key", "extra_info.index")
    read = [row.ground_truth for row in RolloutDataset(command.output).evaluation_rows()]
    assert read == [10, 11, 12]


def test_a_column_with_a_dot_in_its_name_goes_first(command) -> None:
    rows = [{"prompt": "a", "x.y": "column", "x": {"y": "field"}, "x.y.z": {"t": "below"}}]
    data = write(command.folder, "parquet", rows)
    command.run(data, "--ground-truth-key", "x.y")
    assert command.column("ground_truth") == ["column"]
    command.output = command.folder / "other.parquet"
    command.run(data, "--ground-truth-key", "x.y.z.t")
    assert command.column("ground_truth") == ["below"]


@pytest.mark.parametrize(
    ("form", "key", "said"),
    [
        ("parquet", "gone", "no column 'gone'; the columns are 'data_source'"),
        ("parquet", "reward_model.gone", "no 'gone': it holds"),
        ("parquet", "data_source.x", "data_source has no 'x': it holds string"),
        ("jsonl", "reward_model.gone", "no row has that"),
        (
            "jsonl",
            "reward_model.style.x",
            "d.jsonl:1: reward_model.style.x: 'x' is looked for",
        ),
        ("jsonl", "data_source####", "d.jsonl:1: data_source####: there is nothing behind ####"),
    ],
)
def test_a_path_to_nothing_is_refused_before_anything_is_asked(form, key, said, command) -> None:
    data = write(command.folder, form, VERL)
    assert said in command.refused(data, "--ground-truth-key", key)


def named(names: list[Any], key: str = "row_id") -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", key: name} for i, name in enumerate(names)]


@pytest.mark.parametrize("names", [["b", "a", "c"], [7, 3, 5]], ids=["texts", "numbers"])
def test_rows_are_called_by_a_column_row_id(names, command) -> None:
    command.run(write(command.folder, "jsonl", named(names)))
    assert command.column("row_id") == list(map(str, names))
    read = RolloutDataset(command.output).evaluation_rows()
    assert [row.input_metadata.row_id for row in read] == list(map(str, names))


def test_a_column_or_path_can_be_named_for_it(command) -> None:
    command.run(write(command.folder, "parquet", VERL), "--row-id-key", "extra_info.index")
    assert command.column("row_id") == ["10", "11", "12"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "a"], "d.jsonl:3: uid is 'a', as in d.jsonl:1: completions of two rows"),
        ([1, "1"], "d.jsonl:2: uid is '1', as in d.jsonl:1"),
        (["a", None], "d.jsonl:2: uid is null"),
        (["a", " "], "d.jsonl:2: uid is empty"),
        ([1.5, 2.5], "d.jsonl:1: uid is a number, and a row's id is text or a whole number"),
    ],
)
def test_names_that_are_none_are_refused_where_they_were_asked_for(names, said, command) -> None:
    data = write(command.folder, "jsonl", named(names, "uid"))
    assert said in command.refused(data, "--row-id-key", "uid")


def test_a_column_row_id_that_names_two_rows_alike_is_passed_over_and_told(command) -> None:
    said = command.run(write(command.folder, "jsonl", named(["a", "b", "a"])))
    assert "rows are not called by their column row_id: d.jsonl:3: row_id is 'a', as in" in said
    assert command.column("row_id") == ["d-0", "d-1", "d-2"]


def test_only_selected_rows_must_be_called_differently(command) -> None:
    data = write(command.folder, "jsonl", named(["a", "b", "a"]))
    command.run(data, "--row-id-key", "row_id", "--limit", 2)
    assert command.column("row_id") == ["a", "b"]
