"""What `local/<name>` names: models that ship with the package, one that another package brings,
folders, and what was downloaded.

Invariant: a name that begins with `local/` is looked for on this machine alone. A bundled model
loads from its folder, without a network and without remote code.
"""

from __future__ import annotations

import hashlib
import os
import re
from difflib import get_close_matches
from pathlib import Path

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local.models import _smollm2

BUNDLED = ("arithmetic",)
"""Names that `local/<name>` finds inside the package."""


LOCAL_PREFIX = "local/"
VLLM_PREFIX = "vllm/"
"""Before what vLLM samples, in an engine that this process starts."""
VERSION_KEY = "weight_version"
"""In the metadata of a file of weights: what to call them. Other readers pass over it."""


class NoSuchModelError(EvalProtocolRftError, ValueError):
    """Nothing on this machine has that name; the message names what there is."""


def local_model_folder(name: str) -> Path:
    """The folder of `name` (with or without `local/`): a bundled model, a folder, `smollm2`, or a
    model of the hub that was downloaded to this machine before. Nothing is asked of the hub.

    Blocks for half a minute where `smollm2` is asked for the first time on this machine.

    Raises:
        NoSuchModelError: there is no such thing.
    """
    name = name.removeprefix(LOCAL_PREFIX)
    folder = bundled_model_path(name) or Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name == _smollm2.NAME:
        try:
            return _smollm2.folder()
        except (ImportError, OSError) as error:
            raise NoSuchModelError(f"{LOCAL_PREFIX}{name}: {error}") from error
    downloaded = _downloaded(name)
    if downloaded is not None:
        return downloaded
    close = get_close_matches(name, (*BUNDLED, _smollm2.NAME), n=1)
    hint = f"did you mean {LOCAL_PREFIX}{close[0]}? " if close else ""
    raise NoSuchModelError(
        f"{LOCAL_PREFIX}{name}: there is no such model on this machine: {hint}Write "
        f"{' or '.join(LOCAL_PREFIX + one for one in BUNDLED)}, which comes with the package, "
        f"{LOCAL_PREFIX}{_smollm2.NAME}, which another package brings, {LOCAL_PREFIX}<folder> with "
        f"a model's files, or {LOCAL_PREFIX}<hub id> of a model that was downloaded before "
        "(hf download <hub id>)"
    )


_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def vllm_source(name: str) -> str:
    """What vLLM is to load for `name` (with or without `vllm/`): a folder, a model that
    `local/<name>` has by that name, or a hub id, which vLLM looks for itself.

    Raises:
        NoSuchModelError: it is none of them.
    """
    name = name.removeprefix(VLLM_PREFIX)
    if name in (*BUNDLED, _smollm2.NAME) or Path(name).expanduser().is_dir():
        folder = local_model_folder(name)
        if not any((folder / file).is_file() for file in ("config.json", "params.json")):
            raise NoSuchModelError(f"{VLLM_PREFIX}{name}: the folder has no config.json of a model")
        return str(folder)
    if _HUB_ID.fullmatch(name):
        return name
    raise NoSuchModelError(
        f"{VLLM_PREFIX}{name}: there is no such folder, and it is no hub id. Write "
        f"{VLLM_PREFIX}<folder> with a model's files, {VLLM_PREFIX}<hub id>, which vLLM downloads "
        f"where it is not on this machine, or {VLLM_PREFIX}{_smollm2.NAME}"
    )


def folder_here(model: str) -> Path | None:
    """The folder of a model `local/...` or `vllm/...`; None for other names, and where it is not on
    this machine."""
    for prefix in (LOCAL_PREFIX, VLLM_PREFIX):
        if model.startswith(prefix):
            try:
                return local_model_folder(model.removeprefix(prefix))
            except NoSuchModelError:
                return None
    return None


def _downloaded(hub_id: str) -> Path | None:
    """The newest snapshot in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        paths = [
            try_to_load_from_cache(hub_id, file)
            for file in ("config.json", "tokenizer_config.json", "tokenizer.json")
        ]
    except ValueError:  # no name that the hub could have
        return None
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


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
