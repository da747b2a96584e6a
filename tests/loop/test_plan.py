"""What a run will take: every number recomputed here, and the arithmetic that is shown believed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow
from eval_protocol.pytest import evaluation_test
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval_protocol_rft.cli import app
from eval_protocol_rft.loop import (
    Measured,
    Plan,
    PlanError,
    Rates,
    RunSize,
    dry_run,
    measure_groups,
    measure_run,
    plan,
)
from eval_protocol_rft.loop._measured import Spread, tokens_sent
from eval_protocol_rft.training import PromptGroup, Segment, Trajectory
from tests.data.rollout_files import write_rollouts
from tests.rollouts import params_for, row_of

MEASURED = Measured(
    source="here",
    prompts=16,
    completions=128,
    tokens_in=Spread(mean=25.5, deviation=1.5, error=0.25),
    tokens_out=Spread(mean=100.25),
    tokens_trained=Spread(mean=125.75),
    compared=16,
    with_gradient=10,
)
EVERYTHING = Rates(
    price_in=0.2,
    price_out=0.9,
    price_trained=3.0,
    gpu_price=4.0,
    sampling_gpus=2,
    training_gpus=8,
    tokens_per_second=9000.0,
    step_seconds=40.0,
    sync_seconds=15.0,
    setup_minutes=20.0,
)


def trajectory(*mask: int, reward: float | None = None, **fields: Any) -> Trajectory:
    values = np.array(mask, np.float32)
    return Trajectory(
        tokens=np.arange(len(mask)), logprobs=-values, loss_mask=values, reward=reward, **fields
    )


def test_all_numbers_by_hand() -> None:
    made = plan(MEASURED, RunSize(rows=1000, epochs=2, n=8), EVERYTHING)
    hours = (20 * 60 + 63 * (25808 * 100.25 / 63 / 9000 + 40 + 15)) / 3600
    tokens = {"in": 25808 * 25.5, "out": 25808 * 100.25, "trained": 63 * 32 * 8 * 125.75}
    assert made.value("steps") == 63  # 2000 / 32 = 62.5
    assert made.value("prompts") == 3226  # 63 x 32 / 0.625 = 3225.6
    assert made.value("completions") == 25808
    assert made.value("prompt tokens") == tokens["in"]
    assert made.value("sampled tokens") == tokens["out"]
    assert made.value("trained tokens") == tokens["trained"]
    assert made.value("wall-clock") == pytest.approx(hours)
    assert made.value("cost of prompt tokens") == pytest.approx(tokens["in"] * 0.2 / 1e6)
    assert made.value("cost of sampled tokens") == pytest.approx(tokens["out"] * 0.9 / 1e6)
    assert made.value("cost of trained tokens") == pytest.approx(tokens["trained"] * 3 / 1e6)
    assert made.value("cost of the deployment's GPUs") == pytest.approx(hours * 8)
    assert made.value("cost of the trainer's GPUs") == pytest.approx(hours * 32)
    assert made.value("cost") == pytest.approx(
        hours * 40 + tokens["in"] * 2e-7 + tokens["out"] * 9e-7 + tokens["trained"] * 3e-6
    )
    assert made.left_out == {}


def test_sampling_ahead_takes_the_slower_of_both() -> None:
    for per_second, seconds in ((1e9, 55.0), (100.0, 256 * 100.25 / 100)):
        rates = Rates(tokens_per_second=per_second, step_seconds=40, sync_seconds=15)
        size = RunSize(steps=10, n=8, every_prompt=True, overlap=True)
        made = plan(MEASURED, size, rates)
        assert made.value("wall-clock") == pytest.approx(10 * seconds / 3600)
        assert made.left_out["start of trainer and deployment"] == ["--setup-minutes"]


def test_a_step_of_the_trainer_by_the_size_of_the_model() -> None:
    size = RunSize(steps=10, n=8, parameters=8)
    made = plan(MEASURED, size, Rates(tflops=300, training_gpus=8))
    tokens = 32 * 8 * 125.75
    assert made.value("training a step") == pytest.approx(6 * 8e9 * tokens / (300e12 * 8))
    assert made.left_out["wall-clock"]


def test_what_has_no_price_is_left_out_and_named() -> None:
    made = plan(MEASURED, RunSize(steps=10), Rates())
    assert [line.name for line in made.lines] == [
        *("steps", "prompts", "completions"),
        *("prompt tokens", "sampled tokens", "trained tokens"),
    ]
    assert made.left_out["cost of prompt tokens"] == ["--price-in"]
    assert made.left_out["cost"] == ["a price"]
    assert made.left_out["sampling a step"] == ["--tokens-per-second"]
    assert made.value("completions") == 512 * 8  # n is the dry run's: 10 x 32 / 0.625 prompts


def test_no_rate_has_a_default() -> None:
    assert {getattr(Rates(), name) for name in Rates.__slots__} == {None}


rates = st.none() | st.floats(0.01, 1e5)
counts = st.none() | st.integers(1, 64)


@given(
    size=st.builds(
        RunSize,
        rows=st.integers(1, 10**6),
        epochs=st.none() | st.floats(0.1, 20),
        groups_per_step=st.integers(1, 512),
        n=st.none() | st.integers(1, 64),
        every_prompt=st.booleans(),
        overlap=st.booleans(),
        parameters=st.none() | st.floats(0.1, 1000),
    ),
    given_rates=st.builds(
        Rates,
        price_in=rates,
        price_out=rates,
        price_trained=rates,
        gpu_price=rates,
        sampling_gpus=counts,
        training_gpus=counts,
        tokens_per_second=rates,
        step_seconds=rates,
        tflops=rates,
        sync_seconds=rates,
        setup_minutes=rates,
    ),
)
def test_the_arithmetic_that_is_shown_gives_the_number(size: RunSize, given_rates: Rates) -> None:
    made = plan(MEASURED, size, given_rates)
    for line in made.lines:
        if line.arithmetic != "as given":
            assert computed(line.arithmetic) == pytest.approx(line.value, rel=1e-3, abs=0.02), line


WORDS = re.compile(
    r"(?<![\w.])(epochs|rows|a step|steps|tokens/s|tokens|prompts|parameters|FLOP/s|FLOP|GPUs|USD"
    r"|upwards|s|h)(?![\w(])"
)


def computed(arithmetic: str) -> float:
    """The value of the arithmetic as a reader would take it."""
    text = WORDS.sub("", re.sub(r"(?<=\d),(?=\d{3})", "", arithmetic).removesuffix(", upwards"))
    value = float(eval(text.replace(" x ", " * ")))  # noqa: S307 - of numbers
    return math.ceil(value - 1e-9) if arithmetic.endswith("upwards") else value


@given(
    st.lists(
        st.lists(st.sampled_from([0, 1]), min_size=1, max_size=30).map(lambda m: [0, *m, 1]),
        min_size=1,
        max_size=4,
    )
)
def test_each_turn_is_sent_with_all_that_stands_before_it(masks: list[list[int]]) -> None:
    segments = [trajectory(*mask) for mask in masks]
    first, *more = segments
    whole = trajectory(
        *masks[0],
        more=tuple(
            Segment(tokens=s.tokens, logprobs=s.logprobs, loss_mask=s.loss_mask) for s in more
        ),
    )
    sent = 0
    for mask in masks:
        for i, bit in enumerate(mask):
            if bit and not mask[i - 1]:
                sent += i
    assert tokens_sent(whole) == sent
    assert first.loss_mask[0] == 0


def test_groups_are_measured_with_their_spread_over_prompts() -> None:
    groups = [
        PromptGroup(
            key=0,
            trajectories=(trajectory(0, 0, 1, reward=1.0), trajectory(0, 0, 1, 1, reward=0.0)),
        ),
        PromptGroup(key=1, trajectories=(trajectory(0, 1, 1, 1, 1, finish_reason="length"),)),
        PromptGroup(key=2, trajectories=(), failed_rows=("the server is gone",)),
    ]
    measured = measure_groups(groups, source="three")
    assert (measured.prompts, measured.completions, measured.failed) == (3, 3, 1)
    assert measured.truncated == 1
    assert (measured.compared, measured.with_gradient) == (1, 1)
    out = np.array([1, 2, 4])
    assert measured.tokens_out.mean == pytest.approx(out.mean())
    assert measured.tokens_out.deviation == pytest.approx(out.std(ddof=1))
    assert measured.tokens_out.error == pytest.approx(np.std([1.5, 4], ddof=1) / math.sqrt(2))
    assert measured.tokens_in == Spread(
        mean=pytest.approx(5 / 3),
        deviation=pytest.approx(np.std([2, 2, 1], ddof=1)),
        error=pytest.approx(np.std([2, 1], ddof=1) / math.sqrt(2)),
    )
    assert measured.tokens_trained is not None
    assert measured.tokens_trained.mean == 4


def test_where_nothing_came_back_the_reason_is_told() -> None:
    groups = [PromptGroup(key=0, trajectories=(), failed_rows=("the server is gone",))]
    with pytest.raises(PlanError, match="no completion came back: the server is gone"):
        measure_groups(groups, source="s")


def test_prompts_that_are_all_scored_alike_fill_no_step() -> None:
    alike = Measured(
        source="s",
        prompts=4,
        completions=16,
        tokens_out=Spread(mean=3),
        compared=4,
        with_gradient=0,
    )
    with pytest.raises(PlanError, match="scored alike, for each of 4 prompts"):
        plan(alike, RunSize(steps=1), Rates())
    assert plan(alike, RunSize(steps=1, every_prompt=True), Rates()).value("prompts") == 32


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "how large"),
        ({"rows": 3, "steps": 3}, "how large"),
        ({"steps": 3, "epochs": 1.0}, "of how many --rows"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_a_size_that_says_too_little_or_too_much_is_refused(size: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        RunSize(**size)


def test_a_training_run_tells_lengths_shares_and_the_trainers_seconds() -> None:
    def step(completions: int, mean: float, trained: int, seconds: float) -> dict[str, Any]:
        return {
            "kind": "step",
            "completions": completions,
            "completion_tokens_mean": mean,
            "groups": completions // 8,
            "groups_trained": trained,
            "truncated": 2,
            "seconds": {"sampling": 9.0, "batch": 0.5, "train": seconds, "publish": 0.5},
        }

    lines = [{"kind": "eval", "step": 0}, step(256, 10.0, 32, 2.0), step(512, 40.0, 32, 4.0)]
    measured = measure_run(lines, source="run")
    assert measured.tokens_out.mean == 30.0
    assert (measured.compared, measured.with_gradient) == (96, 64)
    assert measured.step_seconds == 4.0
    made = plan(measured, RunSize(steps=10), EVERYTHING)
    assert made.value("completions") == 10 * 32 * 1.5 * 8
    assert "prompt tokens" in made.left_out
    with pytest.raises(PlanError, match="took no step"):
        measure_run(lines[:1], source="run")


def test_a_dry_run_samples_a_few_rows_for_real(server: Any, processor: Any) -> None:
    def letters(row: EvaluationRow) -> EvaluationRow:
        """Half for each letter, so that completions differ."""
        row.evaluation_result = EvaluateResult(score=len(str(row.messages[-1].content)) / 2)
        return row

    letters.__annotations__ = {"row": EvaluationRow, "return": EvaluationRow}
    rows = [row_of(f"row-{i}") for i in range(6)]
    test = evaluation_test(
        input_rows=[rows], completion_params=[params_for(server)], rollout_processor=processor
    )(letters)
    measured = dry_run(test, dry_rows=4, completion_params={"n": 3}, progress=False)
    assert (measured.prompts, measured.completions) == (4, 12)
    assert len(server.requests) == 12
    assert measured.tokens_in is not None
    assert measured.tokens_in.mean == np.mean([len(seen.prompt) for seen in server.requests])
    assert measured.seconds is not None
    assert measured.compared == 4


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments), "--quiet"])


def test_the_command_plans_from_a_file_in_lines_and_in_json(tmp_path: Path) -> None:
    file = write_rollouts(tmp_path / "rollouts.parquet", [["one", "two"], ["three", "four"]])
    shown = run(file, "--steps", 10, "--price-out", 0.5)
    assert shown.exit_code == 0, shown.output
    assert "4 completions of 2 prompts" in shown.output
    assert "not scored, so as if every prompt had a gradient" in shown.output
    assert re.search(r"cost of sampled tokens: \S+ / 1e6 x 0.5 USD = \S+ USD", shown.output)
    assert "cost of prompt tokens: needs --price-in" in shown.output
    as_json = run(file, "--steps", 10, "--price-out", 0.5, "--json")
    value = json.loads(as_json.stdout)
    assert {line["name"]: line["value"] for line in value["lines"]}["completions"] == 10 * 32 * 2
    import msgspec

    assert msgspec.convert(value, Plan).value("steps") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollouts.parquet"], "how large is the run to be"),
        (["rollouts.parquet", "--steps", 1, "--model", "m"], "--model is of a dry run"),
        (["rollouts.parquet", "--steps", 1, "--dry-rows", 3], "--dry-rows is of a dry run"),
        (["no.parquet", "--steps", 1], "no.parquet"),
        (["no.py::test", "--steps", 1], "there is no file"),
    ],
)
def test_a_command_that_cannot_plan_says_why(
    arguments: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rollouts(tmp_path / "rollouts.parquet", [["one", "two"]])
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
