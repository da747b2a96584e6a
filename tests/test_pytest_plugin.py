"""What pytest says of evaluation tests: a summary of each, and no pass without a finding. Each test
runs pytest on a project of its own, with the plugin as its entry point loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stub_server import Seen, Status, StubServer

Run = Callable[..., str]

PROJECT = """
from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, score_each_completion
from tests.rollouts import chat_tokenizer
from tests.scored_rows import give

PROCESSOR = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
ROWS = [
    EvaluationRow(
        messages=[Message(role="user", content=f"question {i}")],
        input_metadata=InputMetadata(row_id=f"row-{i}"),
    )
    for i in range(3)
]

def case(rows=ROWS, sets=1, mode="pointwise", num_runs=1, **params):
    base = {"model": "m", "api_base": "SERVER", "n": 4, "max_tokens": 8, "seed": 1}
    return evaluation_test(
        input_rows=[rows],
        completion_params=[{**base, "top_k": i, **params} for i in range(sets)],
        rollout_processor=PROCESSOR,
        mode=mode,
        num_runs=num_runs,
    )
"""


@pytest.fixture
def run(
    tmp_path: Path,
    server: StubServer,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run pytest on `PROJECT` with `source` behind it, in this process, where Eval Protocol is
    imported by now. Returns what it printed; `ended` is how it must have ended."""

    def run(source: str, *arguments: str, ended: str) -> str:
        # A name of its own: pytest keeps what it imported.
        file = tmp_path / f"test_in_{tmp_path.name}.py"
        file.write_text((PROJECT + source).replace("SERVER", server.url))
        plugin = "eval_protocol_rft.pytest_plugin"
        # The pytest around it looks for what cannot be raised, which takes it a second.
        off = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
        fixed = ["-p", plugin, *off, "--import-mode=importlib", "-q"]
        pytest.main([*fixed, f"--rootdir={tmp_path}", str(file), *arguments])
        output = capsys.readouterr().out
        assert re.search(rf"^{ended}\b.* in [\d.]+s", output, re.MULTILINE), output
        return output

    return run


def assert_lines(output: str, *patterns: str) -> None:
    """Each pattern is a whole line, in this order, with others between them."""
    lines = iter(output.splitlines())
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern}\n{output}"


JUDGED = """
@case(sets=2)
@score_each_completion
def test_each(row: EvaluationRow) -> EvaluationRow:
    return give(row, 0.0)

@case()
def test_whole(row: EvaluationRow) -> EvaluationRow:
    return give(row, 0.0)
"""


def test_every_case_has_a_line_of_its_own_and_a_score_of_0_is_a_score(run):
    output = run(JUDGED, ended="3 passed")
    assert_lines(
        output,
        "=+ evaluation tests =+",
        r".*test_each\[.*0.*: 3 rows, 12 completions, 12 scored, 0 retries, \d+ tokens",
        r".*test_each\[.*1.*: 3 rows, 12 completions, 12 scored, 0 retries, \d+ tokens",
        r".*test_whole.*: 3 rows, 12 completions, 3 rows judged by their first completion, "
        r"3 scored, 0 retries, \d+ tokens",
    )


ALL_FAILED = """
@case(temperature=0)
@score_each_completion
def test_each(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@case(temperature=0)
def test_whole(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@case(temperature=0, mode="groupwise", num_runs=2)
def test_groupwise(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, 1.0) for row in rows]
"""


@pytest.mark.parametrize("scheduler", ["0", "1"])
def test_a_test_whose_rows_all_failed_does_not_pass(run, scheduler, monkeypatch):
    monkeypatch.setenv("EP_USE_PRIORITY_SCHEDULER", scheduler)
    output = run(ALL_FAILED, ended="3 failed")
    assert_lines(
        output,
        r"no row was rolled out: 3 of 3 failed, first: .*\['temperature'\] is 0 with n=4.*",
        r".*--ep-rft-allow-unscored.*ep_rft_allow_unscored = true.*",
        "=+ evaluation tests =+",
        r".*test_each.*: 3 rows, 0 completions, 0 scored, 0 retries, 0 tokens",
        r"  3 rows failed, first: .*\['temperature'\] is 0 with n=4.*",
        r".*test_groupwise.*: 6 rows, 0 completions, .*",
    )


NOT_SCORED = """
@case()
@score_each_completion
def test_raises(row: EvaluationRow) -> EvaluationRow:
    raise ValueError("no number in it")

@case()
def test_invalid(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0, is_score_valid=False, reason="not for me")
"""


@pytest.mark.parametrize("scheduler", ["0", "1"])
def test_a_test_that_scored_nothing_does_not_pass(run, scheduler, monkeypatch):
    monkeypatch.setenv("EP_USE_PRIORITY_SCHEDULER", scheduler)
    output = run(NOT_SCORED, ended="2 failed")
    assert_lines(
        output,
        "nothing was scored: 12 without a score, first: ValueError: no number in it .*",
        "nothing was scored: 3 without a score, first: not for me",
        "=+ evaluation tests =+",
        r".*test_raises.*: 3 rows, 12 completions, 0 scored, .*",
    )


@pytest.mark.parametrize("told", ["option", "ini"])
def test_it_passes_where_it_is_told_to_and_the_summary_stays(run, told, tmp_path):
    if told == "ini":
        (tmp_path / "pytest.ini").write_text("[pytest]\nep_rft_allow_unscored = true")
    output = run(
        NOT_SCORED, *(["--ep-rft-allow-unscored"] if told == "option" else []), ended="2 passed"
    )
    assert_lines(output, "  12 without a score, first: ValueError: no number in it .*")


SWALLOWED = """
@case()
def test_raises(row: EvaluationRow) -> EvaluationRow:
    raise ValueError("swallowed")

@case(mode="all")
@score_each_completion
def test_all(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, 1.0) for row in rows]

@case()
def test_one_raises(row: EvaluationRow) -> EvaluationRow:
    assert row.input_metadata.row_id != "row-1"
    return give(row, 1.0)
"""


def test_rows_that_the_priority_scheduler_drops_are_missed(run, monkeypatch):
    monkeypatch.setenv("EP_USE_PRIORITY_SCHEDULER", "1")
    output = run(SWALLOWED, ended="2 failed, 1 passed")
    assert_lines(
        output,
        r"nothing was scored: 3 rows were not judged: .* drops rows whose evaluator raises.*",
        "=+ evaluation tests =+",
        r".*test_one_raises.*, 2 scored, .*",
        r"  1 rows were not judged: .*",
    )


COPIES = """
@case()
def test_copies(row: EvaluationRow) -> EvaluationRow:
    return give(row.model_copy(deep=True), 1.0)

@case(rows=[])
def test_no_rows(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

def test_another_kind():
    pass
"""


def test_what_is_not_known_fails_nothing_and_no_rows_do(run):
    output = run(COPIES, ended="1 failed, 2 passed")
    assert_lines(
        output, "no row was rolled out: the data set is empty.*", "  3 rows hold no result: .*"
    )
    assert "test_another_kind: " not in output


GROUPS = """
@case(sets=2, mode="groupwise")
def test_one_row_per_model(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    assert [row.input_metadata.completion_params["top_k"] for row in rows] == [0, 1]
    assert [len(row.execution_metadata.extra["completion_ids"]) for row in rows] == [4, 4]
    return [give(row, 1.0) for row in rows]

@case(sets=2, mode="groupwise", n=1)
@score_each_completion
def test_one_completion_per_model(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    assert [row.input_metadata.completion_params["top_k"] for row in rows] == [0, 1]
    return [give(row, 1.0) for row in rows]

@case(mode="groupwise")
@score_each_completion
def test_all_completions_of_one_model(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    assert len(rows) == 4
    return [give(row, 1.0) for row in rows]
"""
MIXED = """
@case(sets=2, mode="groupwise")
@score_each_completion
def test_mixed(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, 1.0) for row in rows]
"""


def test_groups_of_several_models_have_a_row_for_each(run):
    output = run(GROUPS, ended="5 passed")
    assert_lines(
        output,
        r".*test_one_row_per_model.*: 6 rows, 24 completions, 6 rows judged .*, 6 scored, .*",
        r".*test_one_completion_per_model.*: 6 rows, 6 completions, 6 scored, .*",
        r".*test_all_completions_of_one_model.*: 3 rows, 12 completions, 12 scored, .*",
    )


def test_groups_of_several_completions_of_several_models_are_refused_unpaid(run, server):
    output = run(MIXED, ended="2 failed")
    assert_lines(output, r"@score_each_completion with 2 sets of completion_params and n=4 in .*")
    assert server.requests == []


def test_failures_and_retries_are_told_with_their_causes_and_without_control_sequences(run, server):
    def script(seen: Seen) -> Status | None:
        if seen.place % 4 == 0 and seen.attempt == 1:
            return Status(503, b"busy")
        return Status(400, b"no \x1b]0;PWNED\x07") if seen.place % 4 == 1 else None

    server.script = script
    output = run(JUDGED, "-k", "test_each", ended="2 passed")
    assert_lines(
        output,
        r".*test_each.*: 3 rows, 9 completions, 9 scored, 3 retries, \d+ tokens",
        r"  3 completions failed, first: HTTP 400: no \\x1b\]0;PWNED\\x07",
        r"  retries: 3x unavailable 503",
    )


ONE = """
@case(rows=ROWS[:1], n=1)
@score_each_completion
def test_one(row: EvaluationRow) -> EvaluationRow:
    return give(row, 0.0)

@case()
def test_several(row: EvaluationRow) -> EvaluationRow:
    return give(row, 0.0)
"""


def test_a_text_that_the_tokenizer_reads_otherwise_is_told(run):
    output = run(ONE, ended="2 passed")
    assert_lines(
        output,
        r".*test_one\[.*: 1 rows, 1 completions, 1 scored, .*",
        r"  tokenizer '.*' may not be the one of the model that sampled: .*'notwhatwassampled' .*",
        r".*test_several\[.*: 3 rows, 12 completions, .*",
    )
    assert output.count("may not be the one") == 1


SEVERAL_MODELS = """
ARGUMENT = chat_tokenizer()

def of_models(tokenizer, *models, mode="pointwise", **params):
    base = {"api_base": "SERVER", "max_tokens": 8, "seed": 1}
    return evaluation_test(
        input_rows=[ROWS],
        completion_params=[{**base, "model": model, **params} for model in models],
        rollout_processor=FireworksTrainingRolloutProcessor(tokenizer=tokenizer),
        mode=mode,
    )

@of_models(ARGUMENT, "a", "b")
def test_pointwise(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@of_models(ARGUMENT, "a", "b", mode="groupwise")
def test_groupwise(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [give(row, 1.0) for row in rows]

@of_models({"a": ARGUMENT}, "a", "fireworks_ai/b")
def test_mapped_half(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@of_models({"a": ARGUMENT, "b": ARGUMENT}, "a", "fireworks_ai/b")
def test_mapped(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@of_models(ARGUMENT, "a#one", "fireworks_ai/a")
def test_one_model(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)
"""


@pytest.mark.parametrize("name", ["pointwise", "groupwise"])
def test_one_tokenizer_for_several_models_is_refused_unpaid(run, server, name):
    output = run(SEVERAL_MODELS, "-k", f"test_{name}", ended="2 failed, 8 deselected")
    assert_lines(
        output,
        r"one tokenizer, .*, is given for 2 models of this evaluation test: 'a', 'b'. Name .*"
        r"tokenizer=\{'a': \.\.\., 'b': \.\.\.\}\)",
    )
    assert server.requests == []


def test_models_share_a_tokenizer_by_their_own_words(run):
    output = run(SEVERAL_MODELS, "-k", "mapped or one_model", ended="1 failed, 5 passed")
    assert_lines(
        output,
        r".*test_mapped_half\[.*b.*",
        r"no row .*the argument tokenizer names none for model 'b', only for 'a': .*",
    )


def test_the_only_case_that_runs_samples_one_model(run):
    run(SEVERAL_MODELS, "-k", "test_pointwise and 8:a:1", ended="1 passed")


REPLACED = """
PARAMS = {"model": "m", "api_base": "SERVER", "n": 2, "max_tokens": 8, "seed": 1}
OTHERS = [{**PARAMS, "tokenizer": "TOKENIZER"}]

def made(**options):
    return evaluation_test(completion_params=OTHERS, input_rows=[ROWS], **options)

@evaluation_test(
    completion_params=[{**PARAMS, "tokenizer": "TOKENIZER"}],
    input_rows=[ROWS],
    rollout_processor=FireworksTrainingRolloutProcessor(),
)
@score_each_completion
def test_written(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@evaluation_test(
    completion_params=OTHERS,
    input_rows=[ROWS],
    rollout_processor=FireworksTrainingRolloutProcessor(),
)
def test_named(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@evaluation_test(completion_params=OTHERS, input_rows=[ROWS], rollout_processor=PROCESSOR)
def test_argument(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@evaluation_test(
    completion_params=[PARAMS],
    input_rows=[ROWS],
    rollout_processor=FireworksTrainingRolloutProcessor(),
)
def test_silent(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)

@made(rollout_processor=FireworksTrainingRolloutProcessor())
def test_hidden(row: EvaluationRow) -> EvaluationRow:
    return give(row, 1.0)
"""


@pytest.fixture
def replaced(run, server, tokenizer_folder, monkeypatch):
    """Run `REPLACED`, where the environment has other completion_params for all tests."""

    def replaced(*arguments: str, ended: str, **params: Any) -> str:
        base = {"model": str(tokenizer_folder), "api_base": server.url, "max_tokens": 8}
        monkeypatch.setenv("EP_COMPLETION_PARAMS", json.dumps([{**base, **params}]))
        return run(REPLACED.replace("TOKENIZER", str(tokenizer_folder)), *arguments, ended=ended)

    return replaced


def test_a_tokenizer_that_the_environment_takes_away_is_refused(replaced, server):
    output = replaced("-k", "written or named", ended="2 failed")
    assert_lines(
        output, *[r"EP_COMPLETION_PARAMS replaces .* as those of this test do\. Put .*"] * 2
    )
    assert server.requests == []


def test_what_loses_no_tokenizer_is_replaced(replaced):
    output = replaced("-k", "silent or argument or hidden", ended="3 passed")
    told = [line for line in output.splitlines() if "EP_COMPLETION_PARAMS" in line]
    assert_lines(output, r".*test_hidden\[.*: 3 rows, .*", re.escape(told[0]))
    assert len(told) == 1
    assert "here the model's own was used" in told[0]


def test_a_replacement_that_names_a_tokenizer_loses_none(replaced, tokenizer_folder):
    output = replaced(ended="5 passed", tokenizer=str(tokenizer_folder))
    assert "EP_COMPLETION_PARAMS" not in output


def test_a_model_that_has_no_tokenizer_says_what_was_replaced(replaced):
    output = replaced("-k", "hidden", ended="1 failed", model="accounts/me/models/mine")
    assert_lines(output, r"no row .*\(EP_COMPLETION_PARAMS replaces .*")
