"""A job in a child process that dies, or meets a full disk, at a chosen call of the system.

The calls are counted in the child by wrapping those of `os` through which everything is written.
Three ways to end: the process is killed before a call, or halfway through it where it writes, and
the disk has all that was written; or power is cut, and all that was not synced is gone: contents
behind what was synced, and names that were made, replaced or deleted since their folder was synced.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_file
from eval_protocol_rft.data.rollouts._format import FileMetadata, schema
from eval_protocol_rft.data.rollouts._rows import CompletionRow, Score, to_record_batch
from eval_protocol_rft.data.store import _parts as parts
from eval_protocol_rft.data.store._merge import SortedInput, row_keys
from eval_protocol_rft.data.store._parts import PartStore, parts_folder, stored_keys

Pair = tuple[int, int]
KILLED = 9
WRITES = ("pwrite", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir", "rmdir", "open")
"""What changes a disk."""
ASKED: list[Pair] = [(row, sample) for row in range(7) for sample in range(2)]
SCHEMA = schema(FileMetadata(), {"level": pa.int64()})
KEYS_OF = functools.partial(row_keys, position=None)
_BATCH = 3
_PART_ROWS = 5
_CALLS: dict[str, Any] = {name: getattr(os, name) for name in WRITES}


def row(pair: Pair, generation: int, *, failed: bool = False) -> CompletionRow:
    """The completion of `pair`; its seed says in which generation it was sampled."""
    data_idx, sample_idx = pair
    known = {
        "row_id": f"r{data_idx}",
        "data_idx": data_idx,
        "sample_idx": sample_idx,
        "prompt": f"question {data_idx}",
        "prompt_ids": np.arange(3, dtype=np.int32),
        "original": {"level": data_idx},
        "seed": generation,
    }
    if failed:
        return CompletionRow(**known, error="no answer", error_kind="timeout")
    ids = np.arange(1 + data_idx, dtype=np.int32)
    return CompletionRow(
        **known,
        response=f"answer {pair}",
        completion_ids=ids,
        logprobs=-(ids / 8).astype(np.float32),
        finish_reason="stop",
        truncated=False,
        scores={"reward": Score(reward=float(sample_idx))},
    )


# The job


def run_job(
    output: Path,
    generation: int,
    stored: Callable[[Iterable[Pair]], None],
    *,
    retry_failed: bool = False,
) -> None:
    """Sample what is missing, store it, make the file. Goes on from what is there.

    Args:
        output: the file.
        generation: goes into the rows that this run samples.
        stored: called with the pairs for which `append` has returned.
        retry_failed: a finished file is the base; what failed in it is sampled again.
    """
    base = RolloutDataset(output) if output.is_file() else None
    if base is not None and parts.read_schema(parts_folder(output)) is None and not retry_failed:
        return
    parts.ROW_GROUP_ROWS = _PART_ROWS
    store = PartStore(parts_folder(output), SCHEMA, KEYS_OF)
    try:
        done: dict[Pair, bool] = {}
        tables = [] if base is None else [base.tables([*parts.KEY_COLUMNS, "error"])]
        known = [stored_keys(table) for each in tables for table in each]
        for data_idx, sample_idx, failed in [*known, *store.stored()]:
            pairs = zip(data_idx.tolist(), sample_idx.tolist(), strict=True)
            done |= dict(zip(pairs, (failed == 0).tolist(), strict=True))
        missing = [pair for pair in reversed(ASKED) if not done.get(pair, False)]
        batches = [missing[i : i + _BATCH] for i in range(0, len(missing), _BATCH)]
        for batch in batches:
            try:
                store.append(to_record_batch([row(pair, generation) for pair in batch], SCHEMA))
            except OSError:
                # The disk was full; what comes next may fit, and this comes again at the end.
                if batches.count(batch) > 1:
                    raise
                batches.append(batch)
            else:
                stored(batch)
        inputs = [] if base is None else [SortedInput(0, base.tables)]
        write_file(output, SCHEMA, store.merged(inputs))
        store.remove()
    finally:
        store.close()


# The system's calls


@dataclass
class Disk:
    """What would be lost if power were cut now."""

    backup: Path
    synced: dict[str, int] = field(default_factory=dict)
    """File -> bytes that are on disk."""
    undo: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    """Folder -> how to take back what happened to its names, in order."""
    paths: dict[int, str] = field(default_factory=dict)
    saved: int = 0

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Note what a call is about to do."""
        if name == "open" and not os.path.lexists(arguments[0]) and arguments[1] & os.O_CREAT:
            self.synced[str(arguments[0])] = 0
            self._note(arguments[0], functools.partial(_delete, arguments[0]))
        elif name == "mkdir" and not os.path.isdir(arguments[0]):
            self._note(arguments[0], functools.partial(shutil.rmtree, arguments[0], True))
        elif name == "unlink" and os.path.lexists(arguments[0]):
            self._note(arguments[0], self._restorer(arguments[0]))
        elif name == "replace":
            source, target = map(str, arguments[:2])
            self._note(target, self._restorer(target))
            self._note(source, functools.partial(_CALLS["replace"], target, source))
            self.synced[target] = self.synced.pop(source, 0)
        elif name == "fsync":
            path = self.paths[arguments[0]]
            if os.path.isdir(path):
                self.undo.pop(path, None)
            else:
                self.synced[path] = os.path.getsize(path)

    def opened(self, descriptor: int, path: str) -> None:
        self.paths[descriptor] = str(path)

    def lose(self) -> None:
        """Cut power."""
        for path, size in self.synced.items():
            if os.path.isfile(path) and os.path.getsize(path) > size:
                os.truncate(path, size)
        for folder in sorted(self.undo, key=len, reverse=True):
            for step in reversed(self.undo[folder]):
                step()

    def _note(self, path: Any, step: Callable[[], None]) -> None:
        self.undo.setdefault(os.path.dirname(str(path)), []).append(step)

    def _restorer(self, path: Any) -> Callable[[], None]:
        if not os.path.isfile(path):
            return functools.partial(_delete, path)
        self.saved += 1
        copy = self.backup / str(self.saved)
        os.link(path, copy)
        return functools.partial(_CALLS["replace"], copy, path)


def _delete(path: Any) -> None:
    if os.path.lexists(path):
        _CALLS["unlink"](path)


End = Literal["before", "half", "power"]


@dataclass
class Fate:
    """What is to happen in a child: it dies at call `death`, and call `full` finds no space."""

    end: End = "before"
    death: int | None = None
    full: int | None = None
    calls: int = 0
    disk: Disk | None = None

    def install(self) -> None:
        for name in WRITES:
            setattr(os, name, functools.partial(self._call, name))

    def _call(self, name: str, *arguments: Any, **named: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if call == self.death:
            self._die(name, arguments)
        if call == self.full:
            raise OSError(errno.ENOSPC, "no space left on device")
        if self.disk is not None and name != "fsync":
            self.disk.before(name, arguments)
        result = _CALLS[name](*arguments, **named)
        if self.disk is not None and name == "fsync":
            self.disk.before(name, arguments)
        if self.disk is not None and name == "open":
            self.disk.opened(result, arguments[0])
        return result

    def _die(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.end == "half" and name in ("pwrite", "write"):
            descriptor, data, *place = arguments
            size = int(np.random.default_rng(self.calls).integers(0, len(data)))
            _CALLS[name](descriptor, bytes(data[:size]), *place)
        disk, self.disk = self.disk, None
        if disk is not None:
            disk.lose()
        os._exit(KILLED)


# The child


@dataclass(frozen=True, slots=True)
class Life:
    """What became of a child."""

    killed: bool
    calls: int
    """Of the system, where it lived to the end."""
    stored: list[Pair]
    """For which `append` returned."""


def live(output: Path, generation: int, fate: Fate | None = None, **options: bool) -> Life:
    """Run the job in a child process under `fate`."""
    fate = fate or Fate()
    if fate.end == "power":
        backup = output.parent.parent / f"{output.parent.name}.backup"
        shutil.rmtree(backup, ignore_errors=True)
        backup.mkdir()
        fate.disk = Disk(backup)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(60)
        try:
            os.close(reader)
            fate.install()

            def stored(pairs: Iterable[Pair]) -> None:
                _CALLS["write"](writer, b"".join(b"%d %d\n" % pair for pair in pairs))

            run_job(output, generation, stored, **options)
            _CALLS["write"](writer, b"calls %d\n" % fate.calls)
            code = 0
        except OSError as error:
            code = 3 if error.errno == errno.ENOSPC else 1
            if code == 1:
                traceback.print_exc()
        finally:
            # Nothing of the parent's may run here, not even after an error.
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = [line.split() for line in lines]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 3, KILLED), f"the child ended with {status}"
    calls = [int(count) for word, count in said if word == "calls"]
    pairs = [(int(a), int(b)) for a, b in said if a != "calls"]
    return Life(status == KILLED, calls[0] if calls else -1, pairs)


# What must hold


def check(output: Path, lives: Iterable[Life], *, untouched: Collection[Pair] = ()) -> None:
    """The file is whole, has every pair once, and those for which `append` returned as they were
    stored: sampled in that generation, never again."""
    table = pq.read_table(output)
    found = list(zip(table["data_idx"].to_pylist(), table["sample_idx"].to_pylist(), strict=True))
    assert found == ASKED
    generations = dict(zip(found, table["seed"].to_pylist(), strict=True))
    expected = [row(pair, generations[pair]) for pair in ASKED]
    wanted = pa.Table.from_batches([to_record_batch(expected, SCHEMA)])
    assert table.equals(wanted)
    for generation, life in enumerate(lives, start=1):
        for pair in life.stored:
            assert generations[pair] == generation, (pair, generation)
    assert all(generations[pair] == -1 for pair in untouched)
    left = {path.name for path in output.parent.iterdir()}
    assert left <= {output.name, parts_folder(output).name}
    assert parts.read_schema(parts_folder(output)) is None
