"""pytest's side of evaluation tests: a summary of each at the end, and no green test that says
nothing.

Loaded by pytest wherever this package is installed, so importing it costs nothing: Eval Protocol
and all that is heavy are there only if the test at hand is an evaluation test.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from eval_protocol_rft.evaluation_run import Outcome

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
    test = getattr(getattr(item, "obj", None), "__ep_params__", None)
    if test is None:
        return (yield)
    from eval_protocol_rft.evaluation_run import watch
    from eval_protocol_rft.processor import FireworksTrainingRolloutProcessor

    ours = isinstance(test.rollout_processor, FireworksTrainingRolloutProcessor)
    if ours:
        _refuse_several_models(item, test)
    with watch() as run:
        try:
            result = yield
        finally:
            outcome = run.outcome()
            if outcome.rows:
                item.stash[_SUMMARY] = outcome.lines()
    if (outcome.rows or ours) and not _is_allowed(item.config):
        _require_scores(outcome)
    return result


def _refuse_several_models(item: Any, test: Any) -> None:
    """Before anything is paid for; the scorer would refuse its groups afterwards."""
    from eval_protocol_rft.params import ParamsError, parse_completion_params
    from eval_protocol_rft.scoring.decorator import OPTIONS_ATTRIBUTE
    from eval_protocol_rft.scoring.scorer import several_models_problem

    sets = test.completion_params or []
    if test.mode != "groupwise" or len(sets) < 2:
        return
    if not hasattr(getattr(item.obj, "_origin_func", None), OPTIONS_ATTRIBUTE):
        return
    try:
        most = max(parse_completion_params(params).n for params in sets)
    except ParamsError:
        return  # its rows say so
    if most > 1:
        pytest.fail(several_models_problem(len(sets), most), pytrace=False)


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
