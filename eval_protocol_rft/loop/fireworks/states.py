"""Where the training server keeps a saved state: what a folder holds in place of weights.

Invariant: a folder is read back as it was written, or not at all.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from eval_protocol_rft.durable import write_whole
from eval_protocol_rft.loop.trainer import TrainerError

STATE_FILE = "fireworks.json"


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """Weights and optimiser state on the server."""

    path: str
    """As the server named it."""
    trainer_job: str | None
    """Id of the job that saved it, where known: another job finds it by that."""

    def write(self, folder: Path) -> None:
        write_whole(folder / STATE_FILE, msgspec.json.encode(self) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> SavedState:
        """What `write` wrote.

        Raises:
            TrainerError: it is not there, or something else is.
        """
        try:
            return msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise TrainerError(
                f"{folder} holds no state of a Fireworks trainer: {error}"
            ) from error
