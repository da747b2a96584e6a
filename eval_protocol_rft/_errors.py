"""The error that all others of this package are.

Invariant: every error that has a class of its own here is an `EvalProtocolRftError`, and beside it
the built-in error that says what kind it is: a `ValueError` (what was given is wrong), a
`RuntimeError` (it cannot be done now; Eval Protocol does not roll a row out again on those), a
`TypeError` or an `ImportError`. An argument out of range is a plain `ValueError`.
"""

import importlib
from typing import Any


class EvalProtocolRftError(Exception):
    """Base of the errors of this package; the message says what, where and what to do next."""


class MissingPackageError(EvalProtocolRftError, ImportError):
    """An optional package is not installed, or not all of it."""


def require(module: str, *, install: str) -> Any:
    """Import `module` of an optional package.

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
            f"{module} is needed here, and cannot be imported ({error}): pip install '{install}'"
        ) from error
