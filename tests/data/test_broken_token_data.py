"""Files whose token data or order break the format are refused by every command that reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset, in_order
from eval_protocol_rft.data._format import FileMetadata, FormatError, RewardSettings, schema
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.record import Score
from tests.data import score_graders
from tests.data.rollout_files import completion_row, write_rollouts
from tests.data.servers import refused

BREAKS: dict[str, tuple[dict[str, Any], str]] = {
    "more logprobs than ids": ({"logprobs": [-0.5] * 5}, "2 token ids but 5 logprobs"),
    "NaN": ({"logprobs": [-0.5, float("nan")]}, "logprobs[1] is nan"),
    "minus infinity": ({"logprobs": [float("-inf"), -0.5]}, "logprobs[0] is -inf"),
    "a stand-in for it": ({"logprobs": [-0.5, -9999.0]}, "logprobs[1] is -9999.0"),
    "a probability above 1": ({"logprobs": [5.0, -0.5]}, "logprobs[0] is 5.0"),
    "raw logprobs of another length": ({"raw_logprobs": [-0.5]}, "2 token ids but 1 raw_logprobs"),
    "a token below 0": ({"completion_ids": [7, -1]}, "token_ids[1] is -1"),
    "a prompt token below 0": ({"prompt_ids": [-5, 1]}, "prompt_ids[0] is -5"),
    "no prompt": ({"prompt_ids": []}, "prompt_ids is empty"),
    "nothing sampled": (
        {"completion_ids": [], "logprobs": [], "raw_logprobs": []},
        "no tokens",
    ),
    "a null among the ids": ({"completion_ids": [7, None]}, "completion_ids[1] is null"),
    "no logprobs": ({"logprobs": None}, "it has no logprobs"),
    "no text": ({"response": None}, "it has no response"),
    "another end": ({"finish_reason": "tool_calls"}, "finish_reason is 'tool_calls'"),
}


def changed(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    write_rollouts(path, [["a", "b"], [None, "c"], ["d", "e"]])
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


@pytest.mark.parametrize("name", BREAKS)
def test_what_cannot_be_trained_on_is_converted_to_nothing(name: str, tmp_path: Path) -> None:
    values, said = BREAKS[name]
    source = changed(tmp_path / "r.parquet", lambda rows: rows[3].update(values))
    for to, ending in (
        ("verl", "parquet"), ("trl", "jsonl"), ("ep", "jsonl"), ("rollouts", "jsonl"),
    ):  # fmt: skip
        target = tmp_path / f"{to}.{ending}"
        message = refused("convert", source, target, "--to", to)
        assert f"data row 1, completion 1: {said}" in message
        assert not target.exists()


ORDERS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "twice in a row": (
        lambda rows: rows.insert(2, rows[1]),
        "data row 0 has its completion 1 twice",
    ),
    "twice": (lambda rows: rows.insert(2, rows[0]), "data row 0 has its completion 0 twice"),
    "scattered": (lambda rows: rows.append(rows.pop(0)), "completions of data row 0 do not stand"),
    "again at the end": (
        lambda rows: rows.append(rows[0]),
        "completions of data row 0 do not stand",
    ),
}
COMMANDS = {
    "stats": [],
    "report": ["-o", "page.html"],
    "filter": ["-o", "f.parquet", "--drop-truncated"],
    "score": ["-e", f"{score_graders.__file__}::note", "--name", "again"],
    "datums": ["-o", "d.npz"],
    "convert to verl": ["v.parquet", "--to", "verl"],
    "convert to trl": ["t.jsonl", "--to", "trl"],
    "convert to ep": ["e.jsonl", "--to", "ep"],
    "convert to rollouts": ["r2.parquet"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_completions_that_are_there_twice_or_scattered_are_refused_by_every_command(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = ORDERS[order]
    broken = write_rollouts(Path("r.parquet"), [["a", "b"], [None, "c"], ["d", "e"]])
    table = pq.read_table(broken)
    rows = table.to_pylist()
    for row in rows:
        row["reward"] = None if row["error"] else float(row["sample_idx"])
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), broken, row_group_size=2)
    before = sorted(path.name for path in Path().iterdir())
    for name, arguments in COMMANDS.items():
        assert said in refused(name.split()[0], broken, *arguments), name
        assert sorted(path.name for path in Path().iterdir()) == before, name
    assert capfd.readouterr().err == ""
    with pytest.raises(FormatError, match=re.escape(said)):
        list(RolloutDataset(broken).training_rows())


def numbered(*pairs: tuple[int, int]) -> pa.Table:
    data, samples = zip(*pairs, strict=True)
    return pa.table({"data_idx": pa.array(data), "sample_idx": pa.array(samples)})


def test_a_shuffled_file_is_in_order_wherever_its_tables_end() -> None:
    pairs = [(7, 0), (7, 2), (3, 0), (3, 1), (3, 5), (9, 0), (1, 1), (1, 0)]
    for cut in range(1, len(pairs)):
        tables = [numbered(*pairs[:cut]), numbered(*pairs[cut:])]
        assert list(in_order(tables, "f")) == tables
        again = [*tables, numbered((8, 0)), numbered(pairs[0])]
        with pytest.raises(FormatError, match="f: the completions of data row 7 do not"):
            list(in_order(again, "f"))
        for place in range(cut, len(pairs)):
            if pairs[place][0] == pairs[cut - 1][0]:
                twice = [tables[0], numbered(*pairs[cut : place + 1], pairs[cut - 1])]
                with pytest.raises(FormatError, match=f"completion {pairs[cut - 1][1]} twice"):
                    list(in_order(twice, "f"))


DEEP = "[" * 100_000 + "]" * 100_000
EVALUATION_ROWS = {
    "no JSON": "{oops",
    "a list": "[]",
    "deep": '{"execution_metadata": {"extra": {"foreign": ' + DEEP + "}}}",
    "no object inside": '{"execution_metadata": 5}',
    "episodes that are none": '{"execution_metadata": {"extra": {"episodes": {"0": 3}}}}',
    "without this episode": '{"execution_metadata": {"extra": {"episodes": {"7": {"turns": 1, '
    '"stop_reason": "done"}}, "trajectories": {"7": []}}}}',
}


@pytest.mark.parametrize("name", EVALUATION_ROWS)
def test_a_broken_evaluation_row_is_one_line_in_every_command_that_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["evaluation_row"] = EVALUATION_ROWS[name]
            row["reward"] = None if row["error"] else float(row["sample_idx"])

    monkeypatch.chdir(tmp_path)
    changed(Path("r.parquet"), change)
    for command in ("datums", "score", "convert to ep"):
        message = refused(command.split()[0], "r.parquet", *COMMANDS[command])
        assert "evaluation_row" in message, command
        assert message.count("\n") == 1, command


JSON_TEXT = {
    "metrics": ("{oops", "metrics is no JSON"),
    "reward_other_metrics": ("[1]", "reward_other_metrics is no JSON object"),
    "tools": ("{}", "tools is no JSON list"),
    "message": ('{"content": "\\ud800"}', "message is no JSON"),
    "evaluation_row": ("3", "evaluation_row is no JSON object"),
    "original_level": ("{oops", "original_level is no JSON"),
}


@pytest.mark.parametrize("name", JSON_TEXT)
def test_text_that_is_no_json_goes_through_no_command_without_a_word(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = JSON_TEXT[name]
    monkeypatch.chdir(tmp_path)
    other = RewardSettings(evaluator="o", fingerprint="f")
    metadata = FileMetadata(json_columns=["original_level"], rewards={"reward_other": other})
    known = schema(metadata, {"level": pa.string()})
    row = completion_row(0, 0, "a")
    row.prompt, row.original = "q", {"level": 1}
    row.scores = {"reward_other": Score(reward=1.0)}
    table = pa.Table.from_batches([to_record_batch([row, row], known)])
    values = {"sample_idx": [0, 1], name: [None, text]}
    for column, cells in values.items():
        place = table.schema.get_field_index(column)
        table = table.set_column(
            place, known.field(column), pa.array(cells, known.field(column).type)
        )
    pq.write_table(table, "r.parquet")
    commands = [
        ["convert", "r.parquet", "r.jsonl"],
        ["convert", "r.parquet", "v.parquet", "--to", "verl"],
        ["filter", "r.parquet", "-o", "f.parquet", "--drop-truncated"],
        ["score", "r.parquet", "-e", f"{score_graders.__file__}::note", "--quiet"],
    ]
    if name in ("metrics", "reward_other_metrics"):
        commands.append(
            ["stats", "r.parquet", *(["--reward", "other"] if name != "metrics" else [])]
        )
    if name == "tools":
        commands.append(["filter", "r.parquet", "-o", "f.parquet", "--dedupe-prompts"])
    for command in commands:
        message = refused(*command)
        assert "completion 1" in message, command
        assert words.partition(" ")[0] in message, command
        assert message.count("\n") == 1, command
        # What was scored before is kept for the next time.
        assert {p.name for p in Path().iterdir()} <= {"r.parquet", "r.parquet.reward.parts"}
    assert words in refused(*commands[0])


NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "a reward whose sums overflow": ({"reward": 1.7e308}, "reward"),
    "a prompt token below 0": ({"prompt_ids": [-5, 1]}, "prompt_ids[0] is -5: not a token id"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_is_named_with_file_row_and_completion(
    name: str, tmp_path: Path
) -> None:
    values, words = NUMBERS[name]
    source = changed(tmp_path / "r.parquet", lambda rows: rows[3].update(values))
    commands = [["report", source, "--tokenizer", tmp_path], ["show", source]]
    if "reward" in values:
        commands += [
            ["stats", source],
            ["filter", source, "-o", tmp_path / "f.parquet", "--reward-min", "0"],
        ]
    for command in commands:
        message = refused(*command)
        assert str(source) in message, command
        assert "d-1" in message or "data row 1" in message, command
        # A prompt is that of all completions of a record.
        assert "completion 1: " in message or command[0] == "show", command
        assert words in message, command


ROWS = {
    "deep": '{"messages": ' + DEEP + "}",
    "extra is list": '{"messages": [], "execution_metadata": {"extra": [1]}}',
    "input_metadata is int": '{"messages": [], "input_metadata": 5, "execution_metadata": {}}',
    "messages is no list of objects": '{"messages": "x", "execution_metadata": {}}',
}


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_of_eval_protocol_is_one_line(name: str, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(ROWS[name] + "\n")
    message = refused("convert", source, tmp_path / "r.parquet", "--from", "ep")
    assert message.count("\n") == 1
    assert (name if name != "deep" else "recursion") in message


def test_a_negative_number_is_no_place_in_a_file(tmp_path: Path) -> None:
    source = changed(tmp_path / "r.parquet", lambda rows: rows[0].update(data_idx=-5))
    grader = f"{score_graders.__file__}::length"
    assert "a row has the data_idx -5" in refused("score", source, "-e", grader)
