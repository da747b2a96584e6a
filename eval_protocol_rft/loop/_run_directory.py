"""A run's directory: its settings, its metrics, its checkpoints.

Invariant: a checkpoint is whole or not there. `metrics.jsonl` never holds a line of a step that
will be done again: what lies behind the checkpoint that a run goes on from is cut off. One process
at a time works in a run's folder. Whatever changes what a run trains towards, rows or weights,
changes its fingerprint in the settings; the evaluator's code has its own.

    settings.json           what the run is, checked when it is continued
    metrics.jsonl           one line per step and per evaluation
    checkpoints/step-000050 state.json, and what the trainer saved
    model/                  the final weights
    report.html
    .lock                   held by the process that trains
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import filelock
import msgspec
from msgspec import Meta

from eval_protocol_rft._durable import DurableFile, sync_folder, write_whole
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import models
from eval_protocol_rft.loop._scheduler import Draw

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

_PREFIX = "step-"
_LOCK = ".lock"


STATE_FILE = "state.json"


class LoopState(msgspec.Struct, frozen=True):
    """Where a run is: enough to go on with the very rows that come next."""

    version: Annotated[int, Meta(ge=0)]
    """Steps trained and published."""
    taken: Annotated[int, Meta(ge=0)]
    """Turns of rows given out, those put back not counted."""
    put_back: list[Draw]
    """Those that were outstanding: they are sampled again."""


class RunFolderError(EvalProtocolRftError, ValueError):
    """The folder is of another run, or damaged; the message says what differs."""


class RunFolder:
    """One run's files. Open with `RunFolder.open`."""

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None = None) -> None:
        self.path = path
        self._lock = lock
        self.metrics_path = path / "metrics.jsonl"
        self._metrics: DurableFile | None = None

    @staticmethod
    def check(path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Whether a run of these settings may begin or go on in `path`. Changes nothing.

        Raises:
            RunFolderError: it holds a run of other settings, or something else.
        """
        if not path.exists():
            return
        if path.is_dir() and all(entry.name == _LOCK for entry in path.iterdir()):
            return
        known = _known(path)
        if known is None and _has_begun(path):
            raise RunFolderError(
                f"{path / 'settings.json'} is missing or damaged, so the run there cannot be "
                "continued: name another folder"
            )
        if known is None:
            raise RunFolderError(f"{path} holds something that is no training run: name another")
        if not overwrite and _has_begun(path):
            _check_same(path, known, settings)

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> RunFolder:
        """Begin a run in `path`, or go on with the one that is there.

        Raises:
            RunFolderError: as `check`; or another process trains there.
        """
        cls.check(path, settings, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
        lock = _hold(path)
        try:
            # Again: whoever trained here until now may have begun or changed the run.
            cls.check(path, settings, overwrite=overwrite)
            if _known(path) is not None and (overwrite or not _has_begun(path)):
                _remove_run(path)
            if _known(path) is None:
                text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
                write_whole(path / "settings.json", text.encode())
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line that was cut off by a crash is not among them."""
        if not self.metrics_path.exists():
            return []
        whole = self.metrics_path.read_bytes().rpartition(b"\n")[0]
        return [self._line(n, line) for n, line in enumerate(whole.split(b"\n"), 1) if line]

    def _line(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = json.loads(text)
            if isinstance(line["step"], int) and isinstance(line["kind"], str):
                return line  # type: ignore[no-any-return]
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
        raise RunFolderError(
            f"{self.metrics_path}:{number}: no line of metrics: take it out, or begin anew with "
            "--overwrite"
        )

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, the newest first."""
        folders = (self.path / "checkpoints").glob(f"{_PREFIX}*")
        names = [(p.name.removeprefix(_PREFIX), p) for p in folders if p.is_dir()]
        return sorted(((int(n), p) for n, p in names if n.isdecimal()), reverse=True)

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint."""
        return next(iter(self.checkpoints()), None)

    def state(self, checkpoint: Path) -> LoopState:
        """The loop's own state in a checkpoint.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        path = checkpoint / STATE_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=LoopState)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        except msgspec.ValidationError as error:
            raise RunFolderError(f"{path} is not what a checkpoint holds ({error})") from error
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{path} is no JSON") from error

    def set_aside(self, step: int) -> None:
        """Checkpoints newer than `step` are damaged: keep them under names that count no more."""
        for newer, path in self.checkpoints():
            if newer > step:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)

    def cut(self, step: int) -> None:
        """Forget metrics of steps behind `step`."""
        kept = [line for line in self.lines() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.metrics_path, text.encode())

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line of metrics."""
        if self._metrics is None:
            size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
            self._metrics = DurableFile(self.metrics_path, keep=size)
        self._metrics.write((json.dumps(line, allow_nan=False) + "\n").encode())

    @contextlib.contextmanager
    def checkpoint(self, step: int, *, keep: int) -> Iterator[Path]:
        """A folder to write a checkpoint into, which counts once the block ends; older ones but
        the newest `keep` go."""
        parent = self.path / "checkpoints"
        parent.mkdir(exist_ok=True)
        unfinished = parent / f".{_PREFIX}{step:06d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        if self._metrics is not None:
            self._metrics.sync()
        _sync_all(unfinished)
        target = parent / f"{_PREFIX}{step:06d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(unfinished, target)
        sync_folder(parent)
        for _, old in self.checkpoints()[keep:]:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink()
            self._lock.release()
            self._lock = None


def _hold(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path / _LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunFolderError(
            f"{path}: another process trains there: wait for it, stop it, or name another folder"
        ) from None
    return lock


def _known(path: Path) -> dict[str, Any] | None:
    """The settings of the run in `path`, None where there is no run."""
    try:
        settings = json.loads((path / "settings.json").read_bytes())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "groups_per_step" in settings else None


_OWN = (
    *("metrics.jsonl", "checkpoints", "model", "report.html", "curve.svg"),
    *("tensorboard", "wandb", "wandb.json", "settings.json"),
)
"""What a run writes; `settings.json`, which says that there is one, goes last."""


def _remove_run(path: Path) -> None:
    """Remove what a run wrote, and nothing else that lies beside it."""
    for name in _OWN:
        written = path / name
        if written.is_dir() and not written.is_symlink():
            shutil.rmtree(written)
        else:
            written.unlink(missing_ok=True)


def _has_begun(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()


def _sync_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    # Through JSON, as the old ones were: a tuple reads back as a list.
    new = json.loads(json.dumps(new))
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        differences = "; ".join(
            f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in differing
        )
        raise RunFolderError(
            f"{path} holds a run with other settings ({differences}): use its settings, another "
            "folder, or --overwrite"
        )


_SHOWN = 16
"""Hex digits kept."""


def rows_fingerprint(rows: Sequence[EvaluationRow]) -> str:
    """Which rows, in which order, with all that a prompt or an evaluator can see of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            row.model_dump_json(
                include={
                    "messages": True,
                    "tools": True,
                    "ground_truth": True,
                    "input_metadata": {"row_id", "dataset_info"},
                }
            ).encode(errors="surrogatepass")
        )
        digest.update(b"\n")
    return digest.hexdigest()[:_SHOWN]


def weights_fingerprint(model: str, weights: str | Path | None) -> str | None:
    """Of what training begins with, where it lies in a folder of this machine."""
    folder = models.folder_here(model) if weights is None else Path(weights)
    if folder is None or not folder.is_dir():
        return None
    return models.model_folder_fingerprint(folder)[:_SHOWN]
