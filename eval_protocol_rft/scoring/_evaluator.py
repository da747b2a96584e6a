"""The user's evaluator: what `@evaluation_test` leaves on the function that it decorates, which
nobody else reads, and the function as we call it, with one value put in the place of its row.

Eval Protocol promises nothing of what it leaves. From 0.2.100 to 0.3.33 the decorated function has
`__ep_params__` (the decorator's arguments, an `EPParameters`) and `_origin_func` (the function
below the decorator, which may be `@score_each_completion`'s wrapper).

Invariant: a function that is no evaluation test is none here, and looking at one calls and changes
nothing. Whatever an evaluator raises about a completion becomes a `CallFailed` that says what and
where. Only what asks the whole run to end passes through: `KeyboardInterrupt`, cancellation and
`pytest.exit`. `SystemExit` does not: it is how code of models ends that a grader runs. Importing
this module does not load Eval Protocol.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import traceback
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal

import pytest

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import end_copy_of, text_of
from eval_protocol_rft.scoring._reward_functions import FORMS, as_row_function

if TYPE_CHECKING:
    from eval_protocol.models import EPParameters, EvaluationRow

Adapter = Callable[[list[dict[str, Any]]], "list[EvaluationRow]"]
"""Lines of a data set in, rows out."""


def parameters_of(function: object) -> EPParameters | None:
    """The arguments of `@evaluation_test`; None where the function is no evaluation test.

    `mode`, `completion_params` and `evaluation_test_kwargs` are as Eval Protocol runs them: the
    environment (`EP_COMPLETION_PARAMS`) has replaced what it replaces when the test is decorated.
    """
    test: EPParameters | None = getattr(function, "__ep_params__", None)
    return test


def function_below(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that scores: what `@evaluation_test` was put on, or `function` itself."""
    below: Callable[..., Any] = getattr(function, "_origin_func", function)
    return below


def is_evaluation_test(function: Callable[..., Any]) -> bool:
    """Whether `@evaluation_test` was put on it."""
    return function_below(function) is not function


SetsName = Literal["completion_params", "evaluation_test_kwargs"]
"""Arguments of `@evaluation_test` that are lists: each of their sets is a test case of its own."""


def sets_of(test: EPParameters | None, name: SetsName) -> Sequence[Mapping[str, Any]]:
    """The sets of `completion_params` or `evaluation_test_kwargs`, an empty one for None; no set
    where there is no test or it was given none."""
    return [dict(values or {}) for values in getattr(test, name, None) or ()]


def adapter_of(test: EPParameters | None) -> Adapter | None:
    """The test's own `dataset_adapter`; None where it is Eval Protocol's, which is the default."""
    from eval_protocol.pytest.default_dataset_adapter import default_dataset_adapter

    adapter: Adapter | None = getattr(test, "dataset_adapter", None)
    return None if adapter is default_dataset_adapter else adapter


def adapt(test: EPParameters | None, lines: Sequence[Mapping[str, Any]]) -> list[EvaluationRow]:
    """Rows of lines of a data set, by the test's adapter or Eval Protocol's own."""
    from eval_protocol.pytest.default_dataset_adapter import default_dataset_adapter

    return (adapter_of(test) or default_dataset_adapter)([dict(line) for line in lines])


def sampled_sets(item: Any) -> list[Any]:
    """The completion_params that this run of pytest samples with for the test of `item`: those of
    its cases, and with mode="groupwise", which samples with every set in each case, all.

    Eval Protocol makes its cases with `pytest.mark.parametrize`, in which each argument has its own
    name.
    """
    test = parameters_of(item.obj)
    if test is not None and test.mode == "groupwise":
        return list(test.completion_params or ())
    cases = [case for case in item.session.items if getattr(case, "function", 0) is item.function]
    calls = [case.callspec.params for case in cases if hasattr(case, "callspec")]
    return [params["completion_params"] for params in calls if "completion_params" in params]


ALIVE_KEY = "scored_alive"
"""Among an episode's metrics: what was said of it while its environment was alive, a `Score` as
JSON, and `by` whom."""


def scored_alive(extra: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the `extra` of an episode's view says of its score while its environment was alive."""
    value = (extra or {}).get("episode")
    for key in ("metrics", ALIVE_KEY):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) and "by" in value else None


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

    @property
    def name(self) -> str:
        """`file.py::name`, however it was imported; of a lambda with its line."""
        name = self.code.co_qualname
        line = f":{self.code.co_firstlineno}" if name.endswith("<lambda>") else ""
        return f"{Path(self.code.co_filename).name}::{name}{line}"

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Evaluator:
        """Look at `function`, which may be a reward function of another library too.

        Raises:
            EvaluatorError: it is no Python function, has not exactly one of the parameters `row`
                and `rows` nor the form of a reward function, or that parameter's annotation cannot
                be resolved.
        """
        code = getattr(inspect.unwrap(function), "__code__", None)
        if not isinstance(code, CodeType):
            raise EvaluatorError(f"{function!r} is not a Python function: wrap it in a `def`")
        name = getattr(function, "__name__", repr(function))
        parameters = inspect.signature(function).parameters
        names = {"row", "rows"}.intersection(parameters)
        if not names and (of_row := as_row_function(function)) is not None:
            return cls.of(of_row)
        if len(names) != 1:
            there = f"neither, but {', '.join(parameters) or 'none'}: nor has it {FORMS}"
            raise EvaluatorError(
                f"evaluator {name} must have one parameter named `row` (pointwise) or `rows` "
                f"(groupwise, all), it has {'both' if names else there}"
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


class BoundCall:
    """One call of an evaluator whose row or rows can be exchanged."""

    def __init__(self, evaluator: Evaluator, bound: inspect.BoundArguments) -> None:
        self.evaluator = evaluator
        self.given = bound.arguments[evaluator.parameter]
        """The row or rows that the caller passed."""
        self._bound = bound

    def __call__(self, value: Any) -> Any:
        """Call the evaluator on `value`; an awaitable where the evaluator is async."""
        self._bound.arguments[self.evaluator.parameter] = value
        return self.evaluator.function(*self._bound.args, **self._bound.kwargs)

    def attempt(self, value: Any) -> Any:
        """What the evaluator returns for `value`, or a `CallFailed`."""
        if self._has_scored(value):
            return value
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
        if self._has_scored(value):
            return value
        try:
            return await _InOneProcess(self(value))
        except _PASSED_THROUGH:
            raise
        except BaseException as error:  # noqa: BLE001
            return self._failed(error)

    def _has_scored(self, value: Any) -> bool:
        """Whether `value` is an episode that this evaluator scored while its environment was alive.
        What it looked at then is gone, so its result on the row stands."""
        if self.evaluator.parameter != "row":
            return False
        alive = scored_alive(value.execution_metadata.extra)
        return alive is not None and alive["by"] == self.evaluator.name

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


Mode = Literal["pointwise", "groupwise", "all"]


def inner_evaluator(evaluator: Callable[..., Any]) -> Evaluator:
    """The function that scores: what `@evaluation_test` was put on, or `evaluator` itself."""
    return Evaluator.of(function_below(evaluator))


def mode_of(evaluator: Callable[..., Any], function: Evaluator, mode: Mode | None = None) -> Mode:
    """`mode`, or the one `@evaluation_test` brings, or what the parameter alone can mean.

    Raises:
        EvaluatorError: none of them says, or the mode does not fit the parameter.
    """
    test = parameters_of(evaluator)
    if mode is None and test is not None:
        mode = test.mode
    if mode is None:
        if function.parameter == "rows":
            raise EvaluatorError("an evaluator of `rows` needs mode='groupwise' or mode='all'")
        mode = "pointwise"
    if (mode == "pointwise") != (function.parameter == "row"):
        raise EvaluatorError(f"mode {mode!r} does not fit an evaluator of `{function.parameter}`")
    return mode


def own_kwargs(evaluator: Callable[..., Any]) -> Mapping[str, Any]:
    """The keyword arguments that `@evaluation_test` gives the evaluator.

    Raises:
        EvaluatorError: it gives several sets of them.
    """
    sets = sets_of(parameters_of(evaluator), "evaluation_test_kwargs")
    if len(sets) > 1:
        raise EvaluatorError(
            f"the evaluation test has {len(sets)} sets of evaluation_test_kwargs: pass the one to "
            "score with as evaluation_test_kwargs="
        )
    return sets[0] if sets else {}
