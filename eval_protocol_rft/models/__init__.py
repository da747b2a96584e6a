"""Models that ship with the package, and where they lie.

Invariant: a bundled model loads from its folder alone, without a network and without remote code.
"""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("arithmetic",)
"""Names that `local/<name>` finds inside the package."""


def bundled_model_path(name: str) -> Path | None:
    """Folder of the bundled model `name`, or None where no such model ships with the package."""
    return Path(__file__).parent / name if name in BUNDLED else None
