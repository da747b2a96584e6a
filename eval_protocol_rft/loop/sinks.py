"""Where a run's metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases.

Invariant: a sink is told each line of a run once, in order, and never decides anything: what it
shows follows from `metrics.jsonl`. A run that is continued goes on in the same sink; steps that are
done again are not there twice. A number that a line lacks is not logged.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eval_protocol_rft.durable import write_whole
from eval_protocol_rft.loop.metrics import Line

PACKAGES = {"tensorboard": ("tensorboard", "torch"), "wandb": ("wandb",)}
"""What each sink needs, by its name."""
_GROUPS = {"step": "train", "eval": "eval"}


class SinkError(ValueError):
    """There is no such sink, or its package is missing; the message says what to install."""


class MetricSink(Protocol):
    """Takes a run's metrics."""

    def write(self, line: Line) -> None:
        """Take one line of `metrics.jsonl`."""

    def close(self) -> None:
        """Nothing more comes."""


def require_sinks(names: Sequence[str]) -> None:
    """Check that these sinks can be opened.

    Raises:
        SinkError: one is unknown, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise SinkError(f"no logger {name!r}: choose from {', '.join(PACKAGES)}")
        missing = [p for p in PACKAGES[name] if importlib.util.find_spec(p) is None]
        if missing:
            raise SinkError(
                f"logging to {name} needs a package that is not here: pip install "
                f"{' '.join(missing)}"
            )


def open_sinks(
    names: Sequence[str], folder: Path, *, settings: Mapping[str, Any], lines: Sequence[Line]
) -> list[MetricSink]:
    """Open sinks for a run, each once, new or where it left off.

    Args:
        names: `tensorboard`, `wandb`.
        folder: the run's.
        settings: of the run, for those that show them.
        lines: the metrics so far that the run goes on from. A sink that is new gets them first.

    Raises:
        SinkError: see `require_sinks`; or a service did not take the run.
    """
    require_sinks(names)
    opened: list[MetricSink] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            opened.append(TensorBoardSink(folder, lines=lines))
        else:
            opened.append(WandbSink(folder, settings=settings, lines=lines))
    return opened


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line by names with slashes: `train/reward_mean`, `eval/pass_at_k/4`."""
    group = _GROUPS.get(line["kind"], str(line["kind"]))
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, Mapping):
            inner = ((f"{group}/{name}/{key}", v) for key, v in value.items())
            found.update((key, float(v)) for key, v in inner if _is_number(v))
        elif _is_number(value):
            found[f"{group}/{name}"] = float(value)
    return found


class TensorBoardSink:
    """Scalars in RUN/tensorboard, for `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, *, lines: Sequence[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        is_new = not any(path.glob("events.out.tfevents.*"))
        following = max((line["step"] for line in lines), default=-1) + 1
        # Told to TensorBoard, so that it forgets steps that are done again.
        purge = None if is_new else following
        self._writer = SummaryWriter(str(path), purge_step=purge)
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run in Weights & Biases, whose id and last steps are kept in RUN/wandb.json.

    Project, entity and mode are those of its own settings (`WANDB_PROJECT`, `WANDB_MODE=offline`).
    What it was told once cannot be taken back: of steps that are done again it keeps the first
    values.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any], lines: Sequence[Line]) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        self._path = folder / "wandb.json"
        is_new = not self._path.is_file()
        kept = {} if is_new else json.loads(self._path.read_text())
        self._id: str = kept.get("id") or secrets.token_hex(4)
        self._told: dict[str, int] = kept.get("told", {})
        try:
            self._run: Any = wandb.init(
                id=self._id,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(settings),
                resume="never" if is_new else "allow",
            )
        except wandb.Error as error:
            raise SinkError(f"Weights & Biases did not take the run: {error}") from error
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        kind, step = line["kind"], line["step"]
        if step <= self._told.get(kind, -1):
            return
        self._run.log(scalars(line), step=step)
        self._told[kind] = step
        write_whole(self._path, json.dumps({"id": self._id, "told": self._told}).encode() + b"\n")

    def close(self) -> None:
        self._run.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
