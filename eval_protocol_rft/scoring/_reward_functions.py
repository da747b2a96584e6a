"""Reward functions of other libraries as evaluators of a row, recognized by their parameters:

- `messages`, of Eval Protocol (`@reward_function`): the conversation, `ground_truth`, and what else
  it has no default for from the columns of the data set; `**kwargs` gets the others.
- `solution_str`, of verl (`compute_score(data_source, solution_str, ground_truth,
  extra_info=None)`, called as its reward manager does; trainer's `custom_reward_function`): the
  text as it was sampled. Its own functions have other names for that text (`SOLUTIONS`). It returns
  a number, or a dict with `score`.
- `completions`, of TRL (`f(prompts, completions, **columns) -> list[float | None]`): lists of one,
  and every column as a list of one, as `GRPOTrainer` passes them.

Invariant: an argument is what its name says, or the call is an error: where there is no such
column, and no ground truth, none is made up. A column never takes the place of a default, but in
TRL's functions, which ask for that.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

SOLUTIONS = ("solution_str", "solution", "predict_str", "model_output", "completion", "response")
"""Names of the text that is judged, in verl's functions; those after the first need a
`ground_truth` beside them."""
FORMS = (
    "messages (of Eval Protocol), solution_str (of verl) or prompts and completions (of TRL), as "
    "reward functions have"
)
_READY = "eval_protocol.rewards."
"""Eval Protocol's own. They mark the score of what did not pass as invalid (`format_reward`: 0.0
where the format does not match), which elsewhere means that nothing is known."""
_VERL = ("data_source", "ground_truth", "extra_info")
_Kind = Literal["messages", "solution", "completions"]


class RewardFunction(NamedTuple):
    """A function of another library's form, and what it asks for."""

    function: Callable[..., Any]
    kind: _Kind
    solution: str
    """Its name of the text, of verl's form."""
    required: tuple[str, ...]
    """Parameters without a default that only a column of the data set can be."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> RewardFunction | None:
        """None where it is of none of the forms."""
        parameters = inspect.signature(function).parameters
        solution = next((name for name in SOLUTIONS if name in parameters), "")
        kind: _Kind
        if "completions" in parameters:
            kind, known = "completions", {"prompts", "completions", "ground_truth"}
        elif "messages" in parameters:
            kind, known = "messages", {"messages", "ground_truth"}
        elif solution == SOLUTIONS[0] or (solution and "ground_truth" in parameters):
            kind, known = "solution", {solution, "ground_truth"}
        else:
            return None
        required = tuple(
            name for name, p in parameters.items() if _must_be_given(p) and name not in known
        )
        return cls(function, kind, solution, required)

    def arguments(self, row: EvaluationRow, given: Mapping[str, Any]) -> dict[str, Any]:
        """What it is called with for a row; what is `given` stays as it is.

        Raises:
            LookupError: the row has no value for a parameter without a default.
        """
        columns = dict(row.input_metadata.dataset_info or {})
        parameters = inspect.signature(self.function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        values: dict[str, Any] = {}
        if self.kind == "messages":
            values = {name: columns[name] for name in self.required if name in columns}
            if takes_all:
                values |= {k: v for k, v in columns.items() if k not in parameters}
            values["messages"] = row.messages
        elif self.kind == "completions":
            named = {k: v for k, v in columns.items() if takes_all or k in parameters}
            values = {name: [value] for name, value in named.items()}
            prompt, answer = _prompt_and_answer(row)
            asked = {"prompts": [prompt], "completions": [answer]}
            values |= {k: v for k, v in asked.items() if takes_all or k in parameters}
        else:
            wanted = [name for name in parameters if name in (*self.required, *_VERL)]
            values = {name: columns[name] for name in wanted if name in columns}
            values[self.solution] = sampled_text(row)
        if (truth := parameters.get("ground_truth")) is not None:
            value = row.ground_truth
            if self.kind == "completions":
                value = None if value is None else [value]
            if value is not None:
                values["ground_truth"] = self._fitting(value)
            elif _must_be_given(truth) and "ground_truth" not in {**values, **given}:
                values |= self._without_truth()
        values |= given
        for name in self.required:
            if name not in values:
                raise LookupError(f"the data set has no column {name}, and {name} has no default")
        return values

    def _annotation(self) -> Any:
        try:
            return typing.get_type_hints(inspect.unwrap(self.function)).get("ground_truth")
        except (NameError, TypeError, AttributeError):  # names that only type checkers know
            return None

    def _fitting(self, value: Any) -> Any:
        """For functions of Eval Protocol, numbers as text where they do not ask for numbers, and
        text as what the assistant should have said where they ask for messages: Eval Protocol
        itself makes a system message of it, or none, and scores 0."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind != "messages" or not (is_number or isinstance(value, str)):
            return value
        annotation = self._annotation()
        if is_number and annotation in (int, float, Any):
            return value
        if "Message" not in str(annotation):
            return str(value)
        from eval_protocol.models import Message

        return [Message(role="assistant", content=str(value))]

    def _without_truth(self) -> dict[str, Any]:
        """The ground truth of a row that has none.

        Raises:
            LookupError: the function needs one.
        """
        annotation = self._annotation()
        if annotation is Any or type(None) in typing.get_args(annotation):
            return {"ground_truth": None}
        raise LookupError(
            "the row has no ground truth, and ground_truth has no default: name the data set's "
            "column of right answers with --ground-truth-key where it is sampled"
        )

    def score(self, returned: Any) -> Any:
        """What it returned as an evaluator returns it.

        Raises:
            ValueError: it is nothing that such a function returns.
        """
        if self.kind == "completions":
            if isinstance(returned, list | tuple) and len(returned) == 1:
                if returned[0] is None:
                    raise ValueError("it returned None: the function does not judge this prompt")
                return returned[0]
            raise ValueError(f"it returned {returned!r:.100} for one completion, not a list of one")
        if self.kind == "solution" and isinstance(returned, Mapping):
            return _result_of(returned)
        if str(self.function.__module__).startswith(_READY) and returned.error is None:
            return returned.model_copy(update={"is_score_valid": True})
        return returned


def _must_be_given(parameter: inspect.Parameter) -> bool:
    is_one = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return is_one and parameter.default is parameter.empty


def sampled_text(row: EvaluationRow) -> str:
    """The completion as it was sampled, thinking and calls in it; of an episode of several turns,
    and of a row without a record, what its last message says."""
    extra = row.execution_metadata.extra or {}
    texts, index = extra.get("completions_text"), extra.get("completion_index")
    if texts and index is not None and "episode" not in extra:
        return str(texts[index])
    content = row.messages[-1].content if row.messages else None
    return content if isinstance(content, str) else ""


def _prompt_and_answer(row: EvaluationRow) -> tuple[Any, Any]:
    """As TRL has them: messages, or text where the prompt was raw text."""
    text = sampled_text(row)
    messages = [message.model_dump(exclude_none=True) for message in row.messages[:-1]]
    sampling = (row.execution_metadata.extra or {}).get("sampling")
    if isinstance(sampling, Mapping) and sampling.get("raw"):
        return "".join(str(message.get("content", "")) for message in messages), text
    return messages, [{"role": "assistant", "content": text}]


def _result_of(returned: Mapping[str, Any]) -> Any:
    """verl's dict: `score`, and what it logs beside it."""
    from eval_protocol.models import EvaluateResult, MetricResult

    if not isinstance(score := returned.get("score"), Real):
        raise ValueError(f"it returned a dict whose 'score' is {score!r:.100}, not a number")
    others = {str(name): value for name, value in returned.items() if name != "score"}
    metrics = {
        name: MetricResult(score=float(value), is_score_valid=True, reason="")
        for name, value in others.items()
        if isinstance(value, Real)
    }
    texts = [f"{name}: {value}" for name, value in others.items() if name not in metrics]
    return EvaluateResult(score=float(score), reason="; ".join(texts) or None, metrics=metrics)


def as_row_function(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function of `row` that calls it; None where it is of none of the forms."""
    reward = RewardFunction.of(function)
    if reward is None:
        return None
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def of_row(row: EvaluationRow, **given: Any) -> Any:
            return reward.score(await function(**reward.arguments(row, given)))
    else:

        @functools.wraps(function)
        def of_row(row: EvaluationRow, **given: Any) -> Any:
            return reward.score(function(**reward.arguments(row, given)))

    parameters = [inspect.Parameter("row", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            parameters.append(inspect.Parameter(name, parameter.kind))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            parameters.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=None))
    of_row.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return of_row


def may_be_evaluator(function: Callable[..., Any]) -> bool:
    """Whether it takes rows, or is a reward function."""
    names = inspect.signature(function).parameters
    return bool({"row", "rows"}.intersection(names)) or RewardFunction.of(function) is not None


def columns_needed(function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns of the data set that a reward function cannot do without."""
    parameters = inspect.signature(function).parameters
    if {"row", "rows"}.intersection(parameters):
        return ()
    reward = RewardFunction.of(function)
    return () if reward is None else reward.required
