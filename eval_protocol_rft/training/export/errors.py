"""What can go wrong on the way out, and the one place where a consumer's package is imported."""

from __future__ import annotations

import importlib
from typing import Any

from eval_protocol_rft.training.errors import TrainingDataError


class ExportError(TrainingDataError):
    """Data that this consumer cannot be given exactly, or a file that does not hold it."""


class MissingPackageError(ImportError):
    """The package of a consumer is not installed, or not all of it."""


def require(module: str, *, install: str) -> Any:
    """Import `module` of a consumer's package.

    Args:
        module: dotted name.
        install: what `pip install` is to be given.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this export needs {module}, which cannot be imported ({error}): "
            f"pip install '{install}'"
        ) from error
