"""What can be wrong on the way from scored rows to datums.

Invariant: every message says what is wrong, in which row, completion and token, and what to do.

What can go wrong on the way out, and the one place where a consumer's package is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from eval_protocol_rft._errors import EvalProtocolRftError


class TrainingDataError(EvalProtocolRftError, ValueError):
    """Rows, trajectories or options from which no correct training batch can be built."""


class EmptyBatchError(TrainingDataError):
    """Nothing was left to train on. `dropped` says what became of every completion."""

    def __init__(self, dropped: Mapping[str, int]) -> None:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        super().__init__(
            f"no completion is left to train on ({counts or 'there were no rows'}). Sample more "
            "prompts or more completions each, or relax `filters`"
        )
        self.dropped: Mapping[str, int] = dict(dropped)


class BiasedSamplingWarning(UserWarning):
    """Completions that are no fair draws from the policy: their logprobs are no full-vocabulary
    sampling logprobs, so that importance ratios over them are biased; or slower ones of their group
    were cancelled, so that short ones are too many."""


class ExportError(TrainingDataError):
    """Data that this consumer cannot be given exactly, or a file that does not hold it."""


class MissingPackageError(EvalProtocolRftError, ImportError):
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
