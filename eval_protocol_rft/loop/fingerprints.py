"""What a run trains towards, as fingerprints: the rows' content and the weights; the evaluator's
code has its own in `scoring.code`.

Invariant: whatever of them changes the objective changes its fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval_protocol_rft.models import LOCAL_PREFIX, bundled_model_path, model_folder_fingerprint

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

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
    name = model.removeprefix(LOCAL_PREFIX)
    if weights is not None:
        folder = Path(weights)
    elif model.startswith(LOCAL_PREFIX):
        folder = bundled_model_path(name) or Path(name)
    else:
        return None
    return model_folder_fingerprint(folder)[:_SHOWN] if folder.is_dir() else None
