"""A data set of prompts: the same rows in every format, stable numbers, shuffle, filter, limit."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.source._columns import Source
from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError
from tests.data.servers import refused
from tests.scored_files import Sampled
from tests.scored_files import write as write_scored

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} plus {i}?", "answer": str(2 * i), "level": i % 5} for i in range(1300)
]


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.json"
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=400)
    return path


def write_parquet_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems"
    path.mkdir()
    for part, first in enumerate(range(0, len(rows), 600)):
        table = pa.Table.from_pylist(rows[first : first + 600])
        pq.write_table(table, path / f"part-{part}.parquet")
    return path


def write_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    path = folder / "problems"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=min(2, len(rows)))
    return path


def write_tsv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.tsv"
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    return path


def write_jsonl_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems"
    path.mkdir()
    for part, first in enumerate(range(0, len(rows), 600)):
        write_jsonl(path, rows[first : first + 600]).rename(path / f"part-{part}.jsonl")
    return path


def write_gz(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.jsonl.gz"
    content = write_jsonl(folder, rows).read_bytes()
    # Of two members, as `cat a.gz b.gz` leaves.
    half = len(content) // 2
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    return path


def write_zst(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "problems.json.zst"
    with pa.output_stream(path, compression="zstd") as file:
        file.write(write_json(folder, rows).read_bytes())
    return path


Write = Callable[[Path, list[dict[str, Any]]], Path]
TYPED = [
    write_jsonl,
    write_json,
    write_parquet,
    write_parquet_folder,
    write_saved,
    write_jsonl_folder,
    write_gz,
    write_zst,
]
ALL = [*TYPED, write_csv, write_tsv]


def texts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows]


def numbers(source: Source, **options: Any) -> list[int]:
    return [row.data_idx for row in source.rows(**options)]


@pytest.mark.parametrize("write", ALL)
def test_every_format_gives_the_same_rows_each_time(write: Write, tmp_path: Path):
    source = open_source(write(tmp_path, ROWS))
    expected = texts(ROWS) if write in (write_csv, write_tsv) else ROWS
    assert (source.name, source.num_rows) == ("problems", 1300)
    assert [column.name for column in source.columns] == ["prompt", "answer", "level"]
    for _ in range(2):
        rows = list(source.rows())
        assert [row.data_idx for row in rows] == list(range(1300))
        assert [row.values for row in rows] == expected


@pytest.mark.parametrize("write", ALL)
def test_a_shuffle_has_numpys_order_and_rows_keep_their_numbers(write: Write, tmp_path: Path):
    source = open_source(write(tmp_path, ROWS))
    expected = texts(ROWS) if write in (write_csv, write_tsv) else ROWS
    rows = list(source.rows(shuffle_seed=7))
    assert [row.data_idx for row in rows] == list(np.random.default_rng(7).permutation(1300))
    assert all(row.values == expected[row.data_idx] for row in rows)


@pytest.mark.parametrize("write", TYPED)
def test_values_have_the_types_that_are_announced(write: Write, tmp_path: Path):
    source = open_source(write(tmp_path, ROWS))
    assert [column.type for column in source.columns] == [pa.string(), pa.string(), pa.int64()]
    assert not any(column.is_json for column in source.columns)


@pytest.mark.parametrize(
    ("write", "first", "last"),
    [
        (write_jsonl, "problems.jsonl:1", "problems.jsonl:1300"),
        (write_json, "problems.json, row 0", "problems.json, row 1299"),
        (write_csv, "problems.csv:2", "problems.csv:1301"),
        (write_parquet, "problems.parquet, row 0", "problems.parquet, row 1299"),
        (
            write_parquet_folder,
            "problems/part-0.parquet, row 0",
            "problems/part-2.parquet, row 99",
        ),
        (
            write_saved,
            "problems/data-00000-of-00002.arrow, row 0",
            "problems/data-00001-of-00002.arrow, row 649",
        ),
    ],
)
def test_a_row_knows_its_place_in_order_and_shuffled(
    write: Write, first: str, last: str, tmp_path: Path
):
    source = open_source(write(tmp_path, ROWS))
    in_order = {row.data_idx: row.where for row in source.rows()}
    assert (in_order[0], in_order[1299]) == (first, last)
    assert {row.data_idx: row.where for row in source.rows(shuffle_seed=1)} == in_order


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_filter_then_shuffle_then_limit(write: Write, tmp_path: Path):
    source = open_source(write(tmp_path, ROWS))
    where = "level >= 3 and answer.endswith('6')"
    wanted = {i for i, row in enumerate(ROWS) if row["level"] >= 3 and row["answer"][-1] == "6"}
    assert numbers(source, where=where) == sorted(wanted)
    assert numbers(source, where=where, limit=5) == sorted(wanted)[:5]
    shuffled = [i for i in numbers(source, shuffle_seed=3) if i in wanted]
    assert numbers(source, where=where, shuffle_seed=3) == shuffled
    assert numbers(source, where=where, shuffle_seed=3, limit=5) == shuffled[:5]


def test_a_limit_beyond_the_rows_gives_all_and_a_limit_of_0_none(tmp_path: Path):
    source = open_source(write_jsonl(tmp_path, ROWS[:3]))
    assert numbers(source, limit=10) == [0, 1, 2]
    assert numbers(source, limit=0) == []


@pytest.mark.parametrize("option", ["limit", "shuffle_seed"])
def test_negative_options_are_refused_at_once(option: str, tmp_path: Path):
    source = open_source(write_jsonl(tmp_path, ROWS[:3]))
    with pytest.raises(SourceError, match="-1: it must be 0 or more"):
        source.rows(**{option: -1})


@given(size=st.integers(1, 60), seed=st.integers(0, 2**64), limit=st.integers(0, 70))
def test_a_limited_shuffle_is_the_start_of_a_whole_one(
    size: int, seed: int, limit: int, tmp_path_factory: pytest.TempPathFactory
):
    source = open_source(write_jsonl(tmp_path_factory.mktemp("rows"), ROWS[:size]))
    whole = numbers(source, shuffle_seed=seed)
    assert sorted(whole) == list(range(size))
    assert numbers(source, shuffle_seed=seed, limit=limit) == whole[:limit]


def test_a_wrong_filter_is_refused_before_a_row_is_read(tmp_path: Path):
    source = open_source(write_jsonl(tmp_path, ROWS[:3]))
    with pytest.raises(SourceError, match="no column levle; the columns are 'prompt', 'answer'"):
        source.rows(where="levle > 3")


def test_a_filter_that_fails_on_a_row_names_the_row(tmp_path: Path):
    source = open_source(write_jsonl(tmp_path, [{"level": 1}, {"level": None}]))
    with pytest.raises(SourceError, match=r"^problems.jsonl:2: where 'level > 0' fails: .* null"):
        list(source.rows(where="level > 0"))


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv, write_parquet])
def test_the_fingerprint_is_of_the_content_not_of_the_name(write: Write, tmp_path: Path):
    path = write(tmp_path, ROWS[:5])
    before = open_source(path).fingerprint
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    renamed = path.rename(path.with_stem("other"))
    assert open_source(renamed).fingerprint == before
    write(tmp_path, ROWS[:4])
    assert open_source(path).fingerprint != before


@pytest.mark.parametrize("write", [write_parquet_folder, write_saved])
def test_a_folders_fingerprint_follows_from_its_files_in_order(write: Write, tmp_path: Path):
    path = write(tmp_path, ROWS)
    digests = [
        hashlib.sha256(file.read_bytes()).digest()
        for file in sorted(path.iterdir())
        if file.suffix != ".json"
    ]
    assert len(digests) > 1
    assert open_source(path).fingerprint == hashlib.sha256(b"".join(digests)).hexdigest()


def test_a_folder_of_one_file_has_the_fingerprint_of_the_file(tmp_path: Path):
    path = write_parquet(tmp_path, ROWS)
    assert open_source(tmp_path).fingerprint == open_source(path).fingerprint


@pytest.mark.parametrize("write", ALL)
def test_a_data_set_that_was_written_to_after_it_was_opened_is_refused(
    write: Write, tmp_path: Path
):
    path = write(tmp_path, ROWS[:10])
    source = open_source(path)
    file = max(path.iterdir(), key=lambda file: file.suffix != ".json") if path.is_dir() else path
    os.utime(file, ns=(0, 0))
    with pytest.raises(SourceError, match="has changed since it was opened"):
        source.rows()


def test_the_current_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(write_parquet_folder(tmp_path, ROWS))
    assert open_source(".").name == "problems"


@pytest.mark.parametrize("name", ["problems.txt", "problems", "problems.parquet.gz"])
def test_an_unknown_format_is_answered_with_those_that_are_known(name: str, tmp_path: Path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        SourceError, match=r"\.parquet, \.jsonl, \.ndjson, \.csv, \.tsv, \.json, of text"
    ):
        open_source(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"nothing\.jsonl: no such file"):
        open_source(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt\n")],
)
def test_a_data_set_without_rows_is_refused(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=r"a\.\w+: no rows"):
        open_source(tmp_path / name)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: no rows"):
        open_source(tmp_path / "a.parquet")


def prompts(source: Source) -> list[Any]:
    return [row.values["prompt"] for row in source.rows()]


def shards(folder: Path, *names: str, write: Write = write_jsonl) -> list[Path]:
    """A file per name, with one row that holds the name."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path.parent, [{"prompt": path.name}]).rename(path)
    return paths


@pytest.mark.parametrize(
    ("suffix", "write"), [("parquet", write_parquet), ("jsonl", write_jsonl), ("tsv", write_tsv)]
)
def test_hidden_files_in_a_folder_are_nobodys_data(suffix: str, write: Write, tmp_path: Path):
    shards(tmp_path, f"a.{suffix}", f"b.{suffix}", write=write)
    for name in (f"._a.{suffix}", f".b.{suffix}.tmp.{suffix}", f"_tmp.{suffix}", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"Mac")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / f"c.{suffix}").write_bytes(b"Mac")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    expected = [f"a.{suffix}", f"b.{suffix}"]
    assert prompts(open_source(tmp_path)) == expected
    assert prompts(open_source(tmp_path / f"*.{suffix}")) == expected


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path):
    [path] = shards(tmp_path, "_mine.jsonl")
    assert prompts(open_source(path)) == ["_mine.jsonl"]


def test_patterns_and_several_inputs_are_read_one_after_the_other(tmp_path: Path):
    shards(tmp_path, "b/2.jsonl", "b/1.jsonl", "b/3.jsonl.gz", "a/0.jsonl", write=write_jsonl)
    content = (tmp_path / "b" / "3.jsonl.gz").read_bytes()
    (tmp_path / "b" / "3.jsonl.gz").write_bytes(gzip.compress(content))
    source = open_source([tmp_path / "b" / "*.jsonl*", tmp_path / "a"])
    assert prompts(source) == ["1.jsonl", "2.jsonl", "3.jsonl.gz", "0.jsonl"]
    assert [row.where for row in source.rows()] == [
        "b/1.jsonl:1",
        "b/2.jsonl:1",
        "b/3.jsonl.gz:1",
        "a/0.jsonl:1",
    ]
    assert source.name == tmp_path.name
    assert prompts(open_source(str(tmp_path / "**" / "[01].jsonl"))) == ["0.jsonl", "1.jsonl"]


def test_columns_are_those_of_all_files_and_their_types(tmp_path: Path):
    for name, row in (("a", {"x": None, "y": 1}), ("b", {"x": 2}), ("c", {"y": 1.5, "z": "z"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(tmp_path)
    columns = {column.name: (column.type, column.is_json) for column in source.columns}
    assert columns == {
        "x": (pa.int64(), False),
        "y": (pa.string(), True),
        "z": (pa.string(), False),
    }
    rows = [
        {"x": None, "y": 1, "z": None},
        {"x": 2, "y": None, "z": None},
        {"x": None, "y": 1.5, "z": "z"},
    ]
    assert [row.values for row in source.rows()] == rows
    order = np.random.default_rng(3).permutation(3)
    assert [row.values for row in source.rows(shuffle_seed=3)] == [rows[i] for i in order]


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.gz", "a.jsonl"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_first_bytes_say_whether_a_file_is_compressed(
    name: str, pack: Callable[[bytes], bytes], tmp_path: Path
):
    content = write_jsonl(tmp_path, ROWS).read_bytes()
    (tmp_path / "problems.jsonl").unlink()
    (tmp_path / name).write_bytes(pack(content[:1000]) + pack(content[1000:]))
    source = open_source(tmp_path / name)
    assert [row.values for row in source.rows(shuffle_seed=None)] == ROWS
    assert source.fingerprint == hashlib.sha256(content).hexdigest()


def test_zstandard_files_of_several_frames_are_read_whole(tmp_path: Path):
    content = write_jsonl(tmp_path, ROWS).read_bytes()
    (tmp_path / "problems.jsonl").unlink()
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # what pzstd writes before each frame
    codec = pa.Codec("zstd")
    frames = [
        skipped + codec.compress(part, asbytes=True) for part in (content[:999], content[999:])
    ]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [row.values for row in open_source(tmp_path).rows()] == ROWS


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_the_same_rows_under_two_names_are_refused(write: Write, tmp_path: Path):
    path = write(tmp_path, ROWS[:3])
    other = tmp_path / f"other{path.suffix}"
    other.write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match=r"problems\.\w+ has the same content as .*/other\.\w+"):
        open_source(tmp_path)
    other.unlink()
    other.symlink_to(path)
    with pytest.raises(SourceError, match="is named twice"):
        open_source(tmp_path)


def test_a_file_beside_itself_compressed_is_refused(tmp_path: Path):
    write_gz(tmp_path, ROWS)
    with pytest.raises(SourceError, match=r"problems\.jsonl\.gz has the same content as"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["test.jsonl", "train.jsonl"],
        ["sums-dev.jsonl", "sums-training-0.jsonl", "sums-training-1.jsonl"],
        ["test-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"],
    ],
)
def test_a_folder_of_several_splits_is_refused(names: list[str], tmp_path: Path):
    shards(tmp_path, *names)
    with pytest.raises(SourceError, match="several splits") as caught:
        open_source(tmp_path)
    pattern = str(caught.value).rpartition("as '")[2].rstrip("'")
    assert prompts(open_source(pattern)) == [
        n for n in names if n.startswith(Path(pattern).name[:-1])
    ]


@pytest.mark.parametrize(
    "names", [["train-0.jsonl", "train-1.jsonl"], ["latest.jsonl", "trainer.jsonl"]]
)
def test_files_of_one_split_are_a_data_set(names: list[str], tmp_path: Path):
    shards(tmp_path, *names)
    assert prompts(open_source(tmp_path)) == names


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rollouts_that_a_pattern_matches_are_no_rows_to_ask(suffix: str, tmp_path: Path):
    write_scored(tmp_path / f"out.{suffix}", [[Sampled(1.0), Sampled(0.0)]])
    with pytest.raises(SourceError, match=r"there are rollouts in it.*filter --prompts"):
        open_source(tmp_path / f"*.{suffix}")
    if suffix == "jsonl":
        shards(tmp_path, "a.jsonl")
        with pytest.raises(SourceError, match="there are rollouts in it"):
            open_source(tmp_path / "*.jsonl")


def test_a_name_that_is_not_utf_8_costs_a_character(tmp_path: Path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for name in (b"a\xff.jsonl", b"b.jsonl"):
        [path] = shards(folder, "new.jsonl")
        path.write_text(json.dumps({"prompt": name.hex()}))
        path.rename(folder / os.fsdecode(name))
    source = open_source(folder)
    assert source.name == "caf\ufffd"
    assert next(source.rows()).where == "caf\ufffd/a\ufffd.jsonl:1"


@pytest.mark.parametrize("name", ["", [""]])
def test_an_empty_name_is_no_folder(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="the name is empty"):
        open_source(name)
    assert "the name is empty" in refused("generate", "", "-o", "x.parquet", "--model", "m")
    assert "the name is empty" in refused("show", "")


def test_more_compressed_files_than_a_process_may_have_open(tmp_path: Path):
    for i in range(80):
        (tmp_path / f"{i:02}.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "%d"}' % i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 70, hard))
    try:
        with pytest.raises(SourceError, match=r"80 are more than a process may have: raise"):
            open_source(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_source(tmp_path).num_rows == 80


def test_two_readers_of_one_compressed_file_do_not_disturb_each_other(tmp_path: Path):
    source = open_source(write_gz(tmp_path, ROWS))
    both = list(zip(source.rows(shuffle_seed=1), source.rows(shuffle_seed=2), strict=True))
    for seed in (1, 2):
        assert [pair[seed - 1] for pair in both] == list(source.rows(shuffle_seed=seed))


def test_what_is_compressed_is_the_same_data_set(tmp_path: Path):
    packed = write_gz(tmp_path, ROWS[:3])
    assert open_source(packed).fingerprint == open_source(tmp_path / "problems.jsonl").fingerprint
    assert open_source(packed).name == "problems"


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_compressed_file_that_was_cut_off_is_refused(keep: float, tmp_path: Path):
    content = gzip.compress(os.urandom(1000))
    (tmp_path / "a.jsonl.gz").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(SourceError, match=r"^a\.jsonl\.gz: cannot be decompressed: Truncated"):
        open_source(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["a.jsonl"], ["*.csv"], r"\*\.csv: no file has such a name"),
        (["a.jsonl"], ["a.jsonl", "*"], r"a\.jsonl is named twice"),
        (["a.jsonl", "b.csv"], ["a.jsonl", "b.csv"], r"a\.jsonl \(JSON\) and b\.csv \(CSV\)"),
        (["d/a.jsonl", "d/b.csv"], ["d"], r"two formats, such as a\.jsonl and b\.csv: name .*\*"),
        (["d/a.txt"], ["d"], r"neither data files in it"),
        ([], [], "no data set is named"),
    ],
)
def test_inputs_that_make_no_data_set_are_refused(
    names: list[str], given: list[str], message: str, tmp_path: Path
):
    shards(tmp_path, *names)
    with pytest.raises(SourceError, match=message):
        open_source([tmp_path / name for name in given])


def test_tsv_files_with_other_columns_are_refused(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("x\ty\n1\t2\n")
    (tmp_path / "b.tsv").write_text("y\tx\n1\t2\n")
    with pytest.raises(SourceError, match=r"b\.tsv has the columns y, x, but .*a\.tsv has x, y"):
        open_source(tmp_path)
    (tmp_path / "b.tsv").write_text("x\ty\n1\n")
    with pytest.raises(SourceError, match=r"b\.tsv:2: 1 fields .* a tab or a quote"):
        open_source(tmp_path)
