"""Sources of other trainers, as `scripts/trainers.sh` fetches them, made importable.

Engines and kernels that they import, and that need a GPU, are stood in for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

FOLDER = os.environ.get("EP_RFT_TRAINERS")
MISSING = "set EP_RFT_TRAINERS (see CONTRIBUTING.md)"

SOURCES = (
    "skyrl",
    "slime",
    "prime-rl/src",
    "prime-rl/packages/prime-rl-configs/src",
    "areal",
    "nemo-rl",
    "openrlhf",
)
STOOD_IN_FOR = (
    "sglang", "sglang_router", "vllm", "flash_attn", "deepspeed", "swanlab", "trackio", "soundfile",
    "decord", "librosa", "math_verify", "debugpy", "tensorboardX",
)  # fmt: skip
"""Engines, kernels, loggers and readers of media, none of which runs here."""


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of `STOOD_IN_FOR` that is not installed, with whatever is asked of it."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STOOD_IN_FOR:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


@contextlib.contextmanager
def sources() -> Iterator[None]:
    paths = [str(Path(str(FOLDER)) / source) for source in SOURCES]
    sys.path[:0] = paths
    # It remembers that there is no flash attention, before the stand-in looks like it.
    importlib.import_module("transformers.integrations.flash_attention")
    finder = StandIns()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for path in paths:
            sys.path.remove(path)
