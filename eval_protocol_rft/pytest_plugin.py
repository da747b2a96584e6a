"""pytest's side of evaluation tests: a summary of each at the end, and no green test that says
nothing.

Loaded by pytest wherever this package is installed, so importing it costs nothing: Eval Protocol
and all that is heavy are there only if the test at hand is an evaluation test.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor, Outcome, RolloutRequest

OPTION = "--ep-rft-allow-unscored"
INI = "ep_rft_allow_unscored"

_SUMMARY = pytest.StashKey[list[str]]()
_REPORTED = "ep_rft_summary"
"""Attribute of a test's report; pytest-xdist brings it from its workers, as it does all of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "let evaluation tests pass in which no row survived or nothing could be scored"
    parser.getgroup("eval-protocol-rft").addoption(
        OPTION, action="store_true", default=None, dest=INI, help=what
    )
    parser.addini(INI, what, type="bool", default=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch an evaluation test, and fail it where it passes without having found out anything."""
    from eval_protocol_rft.scoring import parameters_of

    test = parameters_of(getattr(item, "obj", None))
    if test is None:
        return (yield)
    from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor, watch

    processor = test.rollout_processor
    ours = isinstance(processor, FireworksTrainingRolloutProcessor)
    if ours and (problem := _problem(item, test, processor)):
        pytest.fail(problem, pytrace=False)
    with watch() as run:
        try:
            result = yield
        finally:
            outcome = run.outcome()
            if outcome.rows:
                more = _warnings(item, test, processor) if ours else []
                item.stash[_SUMMARY] = [*outcome.lines(), *more]
    if (outcome.rows or ours) and not _is_allowed(item.config):
        _require_scores(outcome)
    return result


def _problem(item: Any, test: Any, processor: FireworksTrainingRolloutProcessor) -> str | None:
    """What the test asks for and cannot have, before anything is paid for."""
    from eval_protocol_rft.rollout import lost_tokenizer
    from eval_protocol_rft.scoring import sampled_sets

    if not processor.names_tokenizer and (
        problem := lost_tokenizer(item.function, test.completion_params)
    ):
        return problem
    try:
        requests = [processor.request_of(params) for params in sampled_sets(item)]
    except ValueError:
        return None  # its rows say so
    return processor.tokenizer_problem(requests) or _groups_problem(item, test, requests)


def _groups_problem(item: Any, test: Any, requests: Sequence[RolloutRequest]) -> str | None:
    """The scorer would refuse such groups afterwards."""
    from eval_protocol_rft.scoring import (
        OPTIONS_ATTRIBUTE,
        function_below,
        several_models_problem,
    )

    most = max((request.n for request in requests), default=1)
    if test.mode != "groupwise" or len(requests) < 2 or most < 2:
        return None
    if not hasattr(function_below(item.obj), OPTIONS_ATTRIBUTE):
        return None
    return several_models_problem(len(requests), most)


def _warnings(item: Any, test: Any, processor: FireworksTrainingRolloutProcessor) -> list[str]:
    from eval_protocol_rft.rollout import untold_tokenizer

    if processor.names_tokenizer:
        return []
    warning = untold_tokenizer(item.function, test.completion_params)
    return [warning] if warning else []


def _is_allowed(config: pytest.Config) -> bool:
    return bool(config.getoption(INI) or config.getini(INI))


def _require_scores(outcome: Outcome) -> None:
    problem = outcome.problem
    if problem is not None:
        pytest.fail(
            f"{problem}\n(an evaluation that says nothing does not pass; {OPTION}, or {INI} = true "
            "in pytest's configuration, lets it)",
            pytrace=False,
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and _SUMMARY in item.stash:
        setattr(report, _REPORTED, item.stash[_SUMMARY])
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each evaluation test, and more for what went wrong in it."""
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if hasattr(report, _REPORTED)
    ]
    if not reports:
        return
    terminalreporter.section("evaluation tests")
    for report in sorted(reports, key=lambda report: report.start):
        first, *troubles = getattr(report, _REPORTED)
        terminalreporter.write_line(f"{report.nodeid}: {first}")
        for trouble in troubles:
            terminalreporter.write_line(f"  {trouble}", yellow=True)
