"""The user's evaluator as we call it: unchanged, with one value put in the place of its row.

Invariant: whatever it raises about a completion becomes a `CallFailed` that says what and where.
Only what asks the whole run to end passes through: `KeyboardInterrupt`, cancellation and
`pytest.exit`. `SystemExit` does not: it is how code of models ends that a grader runs.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import traceback
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import pytest

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import end_copy_of, text_of

Parameter = Literal["row", "rows"]

_PASSED_THROUGH = (
    pytest.exit.Exception, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit,
)  # fmt: skip
"""All else says something of the one completion at hand, `pytest.skip`, `pytest.fail` and the time
limits of some libraries too, which are no `Exception`. Let through, it would take every other row's
completions with it, silently so under the priority scheduler."""


class EvaluatorError(EvalProtocolRftError, TypeError):
    """The function cannot be used as an evaluator; the message says what to change."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """One call of the evaluator that raised."""

    error: BaseException
    text: str
    """Type, message, and the line of the user's file it came from."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A user's function and what is known of it. Build it with `Evaluator.of`."""

    function: Callable[..., Any]
    parameter: Parameter
    """`row`: called with one row (pointwise). `rows`: with a list (groupwise, all)."""
    signature: inspect.Signature
    code: CodeType
    """Where the user wrote it."""
    is_async: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Evaluator:
        """Look at `function`.

        Raises:
            EvaluatorError: it is no Python function, has not exactly one of the parameters `row`
                and `rows`, or that parameter's annotation cannot be resolved.
        """
        code = getattr(inspect.unwrap(function), "__code__", None)
        if not isinstance(code, CodeType):
            raise EvaluatorError(f"{function!r} is not a Python function: wrap it in a `def`")
        name = getattr(function, "__name__", repr(function))
        names = {"row", "rows"}.intersection(inspect.signature(function).parameters)
        if len(names) != 1:
            raise EvaluatorError(
                f"evaluator {name} must have one parameter named `row` (pointwise) or `rows` "
                f"(groupwise, all), it has {'both' if names else 'neither'}"
            )
        parameter: Parameter = "row" if "row" in names else "rows"
        return cls(
            function=function,
            parameter=parameter,
            signature=_resolved_signature(function, name, parameter),
            code=code,
            is_async=inspect.iscoroutinefunction(function),
        )

    def bind(self, *args: Any, **kwargs: Any) -> BoundCall:
        """The call with these arguments, positional or keyword; a TypeError where they do not
        fit, before anything is evaluated."""
        return BoundCall(self, self.signature.bind(*args, **kwargs))


@dataclass(frozen=True, slots=True)
class BoundCall:
    """One call of an evaluator whose row or rows can be exchanged."""

    evaluator: Evaluator
    bound: inspect.BoundArguments

    @property
    def given(self) -> Any:
        """The row or rows that the caller passed."""
        return self.bound.arguments[self.evaluator.parameter]

    def __call__(self, value: Any) -> Any:
        """Call the evaluator on `value`; an awaitable where the evaluator is async."""
        self.bound.arguments[self.evaluator.parameter] = value
        return self.evaluator.function(*self.bound.args, **self.bound.kwargs)

    def attempt(self, value: Any) -> Any:
        """What the evaluator returns for `value`, or a `CallFailed`."""
        process = os.getpid()
        try:
            return self(value)
        except _PASSED_THROUGH:
            raise
        except BaseException as error:  # noqa: BLE001
            return self._failed(error)
        finally:
            end_copy_of(process)

    async def attempt_async(self, value: Any) -> Any:
        """What the async evaluator returns for `value`, or a `CallFailed`."""
        try:
            return await _InOneProcess(self(value))
        except _PASSED_THROUGH:
            raise
        except BaseException as error:  # noqa: BLE001
            return self._failed(error)

    def _failed(self, error: BaseException) -> CallFailed:
        """Name the last line in the evaluator's own file, where most users need to look."""
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int | None) else text_of(error.code)
            return CallFailed(error, f"the evaluator called sys.exit ({code!r})")
        frames = [
            (frame.f_code.co_filename, line)
            for frame, line in traceback.walk_tb(error.__traceback__)
        ]
        in_file = [f for f in frames if f[0] == self.evaluator.code.co_filename]
        file, line = (in_file or frames)[-1]
        what = f"{type(error).__name__}: {text_of(error)}"
        return CallFailed(error, f"{what} ({Path(file).name}:{line})")


class _InOneProcess:
    """A coroutine of the user's. A copy of this process that it forks ends at its next `await`,
    before the copy of the event loop goes on with what it shares with ours."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        process = os.getpid()
        step, value = self._coroutine.send, None
        while True:
            try:
                waits_for = step(value)
            except StopIteration as end:
                return end.value
            finally:
                end_copy_of(process)
            try:
                step, value = self._coroutine.send, (yield waits_for)
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's
                step, value = self._coroutine.throw, error


def _resolved_signature(
    function: Callable[..., Any], name: str, parameter: Parameter
) -> inspect.Signature:
    """The signature with string annotations resolved: Eval Protocol compares them with types."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        signature = inspect.signature(function)
        needed = (signature.parameters[parameter].annotation, signature.return_annotation)
        if any(isinstance(annotation, str) for annotation in needed):
            raise EvaluatorError(
                f"evaluator {name}: cannot resolve its annotations ({error}); import that name at "
                "module level, outside `if TYPE_CHECKING`"
            ) from error
        return signature
