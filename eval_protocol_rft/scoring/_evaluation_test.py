"""What `@evaluation_test` leaves on the function that it decorates. Nobody else reads it.

Eval Protocol promises none of it. From 0.2.100 to 0.3.33 the decorated function has
`__ep_params__` (the decorator's arguments, an `EPParameters`) and `_origin_func` (the function
below the decorator, which may be `@score_each_completion`'s wrapper).

Invariant: a function that is no evaluation test is none here, and nothing is called or changed.
Importing this module loads neither Eval Protocol nor pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

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
