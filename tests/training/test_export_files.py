"""A batch in a file and back: equal, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft._durable import replacing
from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._types import ExportError, MissingPackageError
from eval_protocol_rft.training.export import files
from tests.training_batches import batch_of, prompt_groups
from tests.training_rows import scored

FORMATS = {
    "npz": (files.save_npz, files.load_npz),
    "safetensors": (files.save_safetensors, files.load_safetensors),
}
in_each_format = pytest.mark.parametrize(("save", "load"), FORMATS.values(), ids=FORMATS)


def fields(datum: TrainingDatum) -> dict[str, Any]:
    values = {name: getattr(datum, name) for name in datum.__struct_fields__}
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def assert_same(read: TrainingBatch, written: TrainingBatch) -> None:
    for name in set(TrainingBatch.__slots__) - {"datums"}:
        assert getattr(read, name) == getattr(written, name), name
    assert [fields(d) for d in read.datums] == [fields(d) for d in written.datums]


@in_each_format
def test_what_is_read_back_equals_what_was_written(save: Any, load: Any, tmp_path: Path) -> None:
    batch = batch_of(
        prompt_groups(groups=5), algorithm="cispo", normalization="constant", constant_length=64
    )
    save(batch, tmp_path / "batch")
    assert_same(load(tmp_path / "batch"), batch)


@in_each_format
def test_rows_without_a_name_and_versions_unknown_survive(
    save: Any, load: Any, tmp_path: Path
) -> None:
    rows = [
        scored("ä\n", 1.0, 0.0, None, truncated=[1], versions=["v1", None, "v1"]),
        scored(None, 1.0, 0.5, versions=[None, None]),  # type: ignore[arg-type]
    ]
    batch = build_batch(rows, key=lambda row: row["input_metadata"]["row_id"])
    assert {datum.row_id for datum in batch.datums} == {"ä\n", None}
    save(batch, tmp_path / "batch")
    assert_same(load(tmp_path / "batch"), batch)


@in_each_format
def test_a_file_is_replaced_whole_and_leaves_no_other(save: Any, load: Any, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    save(batch_of(prompt_groups()), path)
    again = batch_of(prompt_groups(seed=1), algorithm="rloo")
    save(again, path)
    assert load(path).algorithm == "rloo"
    assert [file.name for file in tmp_path.iterdir()] == ["batch"]


@in_each_format
def test_a_batch_that_cannot_be_written_leaves_the_old_file(
    save: Any, load: Any, tmp_path: Path
) -> None:
    path = tmp_path / "batch"
    batch = batch_of(prompt_groups())
    save(batch, path)
    unwritable = batch_of(prompt_groups(), loss_fn_config={"other": object()})
    with pytest.raises(TypeError):
        save(unwritable, path)
    assert_same(load(path), batch)
    assert len(list(tmp_path.iterdir())) == 1


def test_writing_that_breaks_off_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def break_off() -> None:
        with replacing(path) as unfinished:
            unfinished.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        break_off()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


@in_each_format
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x93NUMPY", b"{}" * 40])
def test_another_file_is_refused_by_name(
    save: Any, load: Any, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="other: not a"):
        load(path)


@in_each_format
def test_a_file_that_is_not_there_is_an_os_error(save: Any, load: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def changed(tmp_path: Path, **arrays: Any) -> Path:
    """An NPZ file of a batch with some arrays exchanged; None takes one out."""
    files.save_npz(batch_of(prompt_groups()), tmp_path / "batch.npz")
    with np.load(tmp_path / "batch.npz") as read:
        held = {**read, **arrays}
    np.savez(tmp_path / "changed.npz", **{k: v for k, v in held.items() if v is not None})
    return tmp_path / "changed.npz"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rewards": None}, r"array 'rewards' must have shape \(12,\) and dtype float64, found no"),
        ({"rewards": np.zeros(3)}, r"array 'rewards' must have shape \(12,\)"),
        ({"logprobs": np.zeros(3)}, "array 'logprobs' must have shape .* float32"),
        ({"offsets": np.zeros(13, np.int64)}, "array 'input_tokens' must have shape"),
        ({"metadata": None}, "not an NPZ file with the array `metadata`"),
        ({"metadata": np.frombuffer(b"{}", np.uint8)}, "no metadata of a training batch"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        files.load_npz(changed(tmp_path, **arrays))


def test_offsets_must_rise(tmp_path: Path) -> None:
    path = changed(tmp_path)
    with np.load(path) as read:
        offsets = read["offsets"].copy()
    offsets[1] = offsets[2]
    with pytest.raises(ExportError, match="'offsets' must rise from 0"):
        files.load_npz(changed(tmp_path, offsets=offsets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_batch": 2}, "of layout 2, this version reads 1"),
        ({"stats": {"groups": "many"}}, "no metadata of a training batch"),
        ({"normalization": "double"}, "no metadata of a training batch: Invalid enum value"),
    ],
)
def test_metadata_of_another_shape_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with np.load(changed(tmp_path)) as read:
        metadata = json.loads(read["metadata"].tobytes()) | change
    encoded = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with pytest.raises(ExportError, match=message):
        files.load_npz(changed(tmp_path, metadata=encoded))


def test_an_npz_file_is_plain_numpy_to_others(tmp_path: Path) -> None:
    batch = batch_of(prompt_groups())
    files.save_npz(batch, tmp_path / "batch.npz")
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as read:
        start, stop = read["offsets"][3:5]
        assert read["target_tokens"][start:stop].tolist() == batch.datums[3].target_tokens.tolist()
        assert json.loads(read["metadata"].tobytes())["loss_fn"] == "ppo"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eval-protocol-rft\[local\]'"):
        files.save_safetensors(batch_of(prompt_groups()), tmp_path / "batch")
