"""Files of format version 1 are read by every command, with the results of then."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from tests.data.version_1 import FILES, FOLDER, results

THEN: dict[str, Any] = msgspec.json.decode(
    gzip.decompress((FOLDER / "results.json.gz").read_bytes())
)


@pytest.mark.parametrize("name", FILES)
def test_every_command_makes_of_it_what_it_made_of_it_then(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RolloutDataset(FOLDER / name).metadata.schema_version == 1
    monkeypatch.chdir(tmp_path)
    now = msgspec.json.decode(msgspec.json.encode(results(name)))
    assert now.keys() == THEN[name].keys()
    for what, result in THEN[name].items():
        assert now[what] == result, what
