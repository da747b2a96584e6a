"""A run that is broken on purpose is stopped, and told why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.loop._run_directory import RunFolderError
from eval_protocol_rft.loop._setup import Parts
from eval_protocol_rft.loop._watch import NothingToTrainOnError, TrainingStoppedError, Watch
from eval_protocol_rft.sampling._types import Completion
from tests.loop.runs import altered, options, run


class Nowhere:
    """Takes new weights and keeps them."""

    async def publish(self, model: Any, weights: Any, version: int) -> None:
        pass


def with_stale_weights(parts: Parts) -> Parts:
    parts.trainer._sink = Nowhere()  # type: ignore[attr-defined]
    return parts


def with_raw_logprobs(completion: Completion) -> Completion:
    assert completion.raw_logprobs is not None
    return replace(completion, logprobs=completion.raw_logprobs)


def with_shifted_logprobs(completion: Completion) -> Completion:
    return replace(completion, logprobs=[*completion.logprobs[1:], completion.logprobs[0]])


def without_eos(completion: Completion) -> Completion:
    if completion.finish_reason != "stop" or len(completion.token_ids) < 2:
        return completion
    return replace(
        completion,
        token_ids=completion.token_ids[:-1],
        logprobs=completion.logprobs[:-1],
        raw_logprobs=None,
        stop_reason=None,
    )


@pytest.mark.parametrize(
    ("broken", "params", "cause", "steps"),
    [
        (with_stale_weights, {}, "stale_weights", 30),
        (altered(with_raw_logprobs), {"temperature": 0.7}, "raw_logprobs", 3),
        (altered(with_shifted_logprobs), {}, "shifted_logprobs", 3),
        (altered(without_eos), {}, "missing_eos", 3),
    ],
    ids=["stale weights", "raw logprobs", "shifted logprobs", "dropped end"],
)
async def test_it_stops_and_names_the_cause(
    broken: Any, params: dict[str, Any], cause: str, steps: int, tmp_path: Path
) -> None:
    chosen = options(steps=steps, learning_rate=1e-3, eval_every=0, eval_completions=0)
    with pytest.raises(TrainingStoppedError) as stopped:
        await run(tmp_path / "run", chosen, broken=broken, completion_params=params or None)
    assert stopped.value.trouble.cause == cause


async def test_warning_alone_is_a_choice(tmp_path: Path) -> None:
    told: list[str] = []
    chosen = options(steps=2, on_mismatch="warn", eval_every=0, eval_completions=0)
    result = await run(
        tmp_path / "run", chosen, broken=altered(with_shifted_logprobs), warn=told.append
    )
    assert len(result.steps) == 2
    assert len(told) == 1
    assert "moved by one token" in told[0]


async def test_a_learning_rate_that_collapses_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    chosen = options(
        steps=60, learning_rate=3e-3, groups_per_step=4, eval_every=0, eval_completions=0
    )
    try:
        await run(tmp_path / "run", chosen, warn=told.append)
    except NothingToTrainOnError as error:
        told.append(str(error))  # in the end all completions are wrong
    assert any("lower the learning rate" in text for text in told)


async def test_an_honest_run_at_another_temperature_agrees(tmp_path: Path) -> None:
    told: list[str] = []
    result = await run(
        tmp_path / "run", options(), completion_params={"temperature": 0.7}, warn=told.append
    )
    assert not told
    assert max(line["mismatch_k3"] for line in result.steps) < 1e-5


@pytest.mark.parametrize("staleness", [1, 2])
async def test_every_step_compares_tokens_also_where_sampling_runs_ahead(
    staleness: int, tmp_path: Path
) -> None:
    result = await run(tmp_path / "run", options(steps=8, max_staleness=staleness, eval_every=0))
    for line in result.steps:
        assert line["mismatch_tokens"] > 0, line
        assert line["mismatch_k3"] < 1e-8


async def test_weights_that_are_stale_show_where_sampling_runs_ahead(tmp_path: Path) -> None:
    """The probe is of the weights that were published last: the first step after shows it."""
    chosen = options(steps=6, learning_rate=3e-3, eval_every=0, max_staleness=1)
    with pytest.raises(TrainingStoppedError) as stopped:
        await run(tmp_path / "run", chosen, broken=with_stale_weights)
    assert stopped.value.trouble.cause == "stale_weights"


def with_names(name: str | None) -> Callable[[Completion], Completion]:
    return lambda completion: replace(completion, policy_version=name, first_policy_version=None)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_completions_of_weights_older_than_the_bound_stop_the_run(
    staleness: int, tmp_path: Path
) -> None:
    chosen = options(steps=4, eval_every=0, max_staleness=staleness)
    with pytest.raises(TrainingStoppedError, match="was sampled by version 0, and the sampler had"):
        await run(tmp_path / "run", chosen, broken=altered(with_names("step-0")))


@pytest.mark.parametrize("name", [None, "of others"])
async def test_a_sampler_that_names_no_versions_is_said_once(
    name: str | None, tmp_path: Path
) -> None:
    warned: list[str] = []
    chosen = options(steps=3, eval_every=0)
    await run(tmp_path / "run", chosen, broken=altered(with_names(name)), warn=warned.append)
    [said] = [text for text in warned if "does not name the weights" in text]
    assert "counted from when its row was started" in said


def test_a_step_that_compares_nothing_is_said_once() -> None:
    watch = Watch()
    assert "could not be compared" in watch.uncompared(3).message
    assert watch.uncompared(4) is None


async def test_what_was_started_is_closed_where_the_folder_cannot_be_made(tmp_path: Path) -> None:
    folder, closed = tmp_path / "run", []

    def watched(parts: Parts) -> Parts:
        close = parts.trainer.aclose

        async def aclose() -> None:
            closed.append("trainer")
            await close()

        parts.trainer.aclose = aclose  # type: ignore[method-assign]
        folder.write_text("another program was quicker")
        return parts

    with pytest.raises(RunFolderError, match="no training run"):
        await run(folder, options(), broken=watched)
    assert closed == ["trainer"]
