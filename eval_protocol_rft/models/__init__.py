"""Models that ship with the package, where they lie, and what tells folders of models apart.

Invariant: a bundled model loads from its folder alone, without a network and without remote code.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

BUNDLED = ("arithmetic",)
"""Names that `local/<name>` finds inside the package."""


def bundled_model_path(name: str) -> Path | None:
    """Folder of the bundled model `name`, or None where no such model ships with the package."""
    return Path(__file__).parent / name if name in BUNDLED else None


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder of weights brings its tokenizer."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _TOKENIZER_FILES)


_PARTS_OF_MODELS = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model", ".jinja", ".txt", ".py"]
)
"""Suffixes of weights, settings, tokenizers, templates and code of their own; no model cards."""


def model_folder_fingerprint(folder: Path) -> str:
    """Hex SHA-256 of what a folder loads as: names and every byte of its files. Reads all of them.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _PARTS_OF_MODELS or path.name.startswith(".") or not path.is_file():
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
