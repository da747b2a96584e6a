r"""Where an iterative run is: a small file, a pure state machine over it, and how its steps train.

Invariant: a phase is written down before its first request is made, and left after its last was
answered. Every phase can be repeated from its beginning without doing anything twice, so a process
that dies anywhere goes on where the file says.

    serve -> generate -> upload -> train -> clean -> serve (next step), or done
                                     \-> failed -> upload (another attempt)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.loop._run_directory import RunFolderError

Phase = Literal["serve", "generate", "upload", "train", "clean", "failed", "done"]
SCHEMA = 1
STATE_FILE = "run.json"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How one reinforcement fine-tuning step trains: what its job is created with."""

    learning_rate: float
    lora_rank: int
    """At least 1: the next step starts from an adapter, and so does the deployment."""
    epochs: int = 1
    """Passes over the step's data. After the first the data is no longer of the policy."""
    loss_method: Literal["GRPO", "DAPO", "GSPO_TOKEN"] = "GRPO"
    kl_beta: float | None = None
    """Penalty to the reference; None leaves it to the method (GRPO is documented with 0.001)."""
    max_context_length: int | None = None
    """Tokens of the longest sample; None leaves it to the server."""
    batch_size: int | None = None
    """Tokens of a packed batch; None leaves it to the server."""
    node_count: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.kl_beta is not None and not 0.0 <= self.kl_beta < math.inf:
            raise ValueError(f"kl_beta must be finite and not negative, got {self.kl_beta}")
        for name in ("lora_rank", "epochs", "max_context_length", "batch_size", "node_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one step saw and made."""

    step: int
    """From 0."""
    model: str
    """What was sampled from, as requests name it."""
    groups: int
    """Prompt groups that were trained on."""
    completions: int
    """Completions that were trained on."""
    mean_score: float
    """Over those completions, before the step."""
    dropped: dict[str, int]
    """Reason -> completions, or whole rows (`failed_row`), that were left out."""
    output_model: str | None = None
    """The model that the step made; None until it has."""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run must remember."""

    schema: int = SCHEMA
    run: str
    """Its name; resources are named after it."""
    settings: dict[str, str | int | float | None]
    """What may not change while the run goes on."""
    step: int = 0
    phase: Phase = "serve"
    attempt: int = 0
    """Of this step's job: 0, and one more after each that failed."""
    model: str | None = None
    """The adapter to sample from and to start the next step from; None: the base model."""
    reports: list[StepReport] = []
    """One per step that has generated, the current one included."""
    failure: str | None = None
    """Why the phase is `failed`."""

    @property
    def name(self) -> str:
        """Of this step's data set, job and model: the same after any restart."""
        again = f"-try{self.attempt}" if self.attempt else ""
        return f"{self.run}-step{self.step}{again}"

    def entered(self, phase: Phase) -> RunState:
        return msgspec.structs.replace(self, phase=phase)

    def generated(self, report: StepReport) -> RunState:
        return msgspec.structs.replace(self, phase="upload", reports=[*self.reports, report])

    def trained(self, output_model: str) -> RunState:
        """The job is done. What it trained on is still to be deleted."""
        report = msgspec.structs.replace(self.reports[-1], output_model=output_model)
        return msgspec.structs.replace(
            self, phase="clean", model=output_model, reports=[*self.reports[:-1], report]
        )

    def cleaned(self, steps: int) -> RunState:
        """The step left nothing behind; on to the next of `steps`."""
        done = self.step + 1
        return msgspec.structs.replace(
            self, step=done, attempt=0, phase="serve" if done < steps else "done"
        )

    def failed(self, why: str) -> RunState:
        return msgspec.structs.replace(self, phase="failed", failure=why)

    def retried(self) -> RunState:
        """Train again on the data that the failed job had, under another name."""
        return msgspec.structs.replace(self, phase="upload", attempt=self.attempt + 1, failure=None)


def check_run_name(run: str) -> None:
    """Raise a ValueError unless `run` can begin the id of a resource."""
    if not _NAME.fullmatch(run):
        raise ValueError(
            f"run is {run!r}: it begins the ids of resources, so at most 40 lower-case letters, "
            "digits and hyphens, a letter first and no hyphen last"
        )


def write_state(folder: Path, state: RunState) -> None:
    """Put `state` in the place of the one before, on disk when this returns."""
    write_whole(folder / STATE_FILE, msgspec.json.format(msgspec.json.encode(state)) + b"\n")


def read_state(folder: Path, fresh: RunState) -> RunState | None:
    """The state in `folder`, which must be of the run that began with `fresh`; None: there is none.

    Raises:
        RunFolderError: it is not readable, or of a run with another name or other settings.
    """
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RunFolderError(f"{path} is no state of a run: {error}") from error
    if state.schema != SCHEMA:
        raise RunFolderError(f"{path} has layout {state.schema}, this version reads {SCHEMA}")
    for name, ours, theirs in (
        ("run", fresh.run, state.run),
        *((name, value, state.settings.get(name)) for name, value in fresh.settings.items()),
    ):
        if ours != theirs:
            raise RunFolderError(
                f"{path} is of a run with {name}={theirs!r}, and this is {name}={ours!r}: take "
                "another folder, or the same value"
            )
    return state
