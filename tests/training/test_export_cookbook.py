"""Samples, runs and rollouts under the rules that the cookbook's recipes check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory
from eval_protocol_rft.training.export.cookbook import CookbookTypes, to_rollout, to_run, to_sample
from tests.training_batches import prompt_groups
from tests.training_rows import failed_row, scored


@dataclass
class Sample:
    """The fields of the cookbook's class of that name, in its order and with its defaults."""

    tokens: list[int]
    logprobs: list[float]
    loss_mask: list[int]
    reward: float
    prompt_model_input: Any = None
    routing_matrices: list[str] | None = None
    finish_reason: str = "stop"
    text: str = ""
    raw_logprobs: list[float] | None = None


@dataclass
class OlderSample:
    """As of commit 2507496b."""

    tokens: list[int]
    logprobs: list[float]
    loss_mask: list[int]
    reward: float
    prompt_model_input: Any = None
    routing_matrices: list[str] | None = None
    finish_reason: str = "stop"
    text: str = ""


@dataclass
class Run:
    segments: list[Sample]
    run_id: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass
class Rollout:
    runs: list[Run]
    row_meta: dict[str, Any] | None = None


TYPES = CookbookTypes(sample=Sample, run=Run, rollout=Rollout)


def accepted(run: Run) -> bool:
    """What the recipes want of a run, from their documentation."""
    for sample in run.segments:
        size = len(sample.tokens)
        assert size >= 2
        assert size == len(sample.logprobs) == len(sample.loss_mask)
        assert sample.raw_logprobs is None or len(sample.raw_logprobs) == size
        assert any(sample.loss_mask)
        assert all(
            value == 0.0
            for value, mask in zip(sample.logprobs, sample.loss_mask, strict=True)
            if not mask
        )
        assert {type(token) for token in sample.tokens} == {int}
        assert {type(value) for value in sample.logprobs} == {float}
        assert {type(value) for value in sample.loss_mask} == {int}
        assert type(sample.reward) is float
    return len({sample.reward for sample in run.segments}) == 1


def turns(reward: float | None = 1.0) -> Trajectory:
    return Trajectory(
        tokens=[1, 2, 3, 4],
        logprobs=[0, -0.5, 0, -0.25],
        loss_mask=[0, 1, 0, 1],
        reward=reward,
        finish_reason="length",
        row_id="r",
        completion=2,
    )


def test_a_sample_by_hand() -> None:
    made = to_sample(turns(), types=TYPES, text="4", raw_logprobs=[-0.75, -1.0])
    assert made == Sample(
        tokens=[1, 2, 3, 4],
        logprobs=[0.0, -0.5, 0.0, -0.25],
        loss_mask=[0, 1, 0, 1],
        reward=1.0,
        finish_reason="length",
        text="4",
        raw_logprobs=[0.0, -0.75, 0.0, -1.0],
    )


def test_an_older_sample_has_no_place_for_raw_logprobs() -> None:
    made = to_sample(turns(), types=CookbookTypes(sample=OlderSample), raw_logprobs=[-0.75, -1.0])
    assert made == OlderSample(
        tokens=[1, 2, 3, 4],
        logprobs=[0.0, -0.5, 0.0, -0.25],
        loss_mask=[0, 1, 0, 1],
        reward=1.0,
        finish_reason="length",
    )


def test_without_classes_the_fields_come_as_dicts() -> None:
    run = to_run([turns()], run_id="x", metadata={"row_id": "r"})
    assert set(run) == {field.name for field in fields(Run)}
    assert set(run["segments"][0]) <= {field.name for field in fields(Sample)}
    assert Sample(**run["segments"][0]) == to_sample(turns(), types=TYPES)


def test_a_group_is_a_rollout_of_one_run_per_completion() -> None:
    for group in prompt_groups():
        rollout = to_rollout(group, types=TYPES)
        assert all(accepted(run) for run in rollout.runs)
        assert [run.segments[0].tokens for run in rollout.runs] == [
            t.tokens.tolist() for t in group.trajectories
        ]
        assert [run.segments[0].reward for run in rollout.runs] == group.rewards.tolist()


def test_segments_of_one_run_share_their_reward() -> None:
    run = to_run([turns(), turns()], types=TYPES, texts=["a", "b"])
    assert accepted(run)
    assert [sample.text for sample in run.segments] == ["a", "b"]
    with pytest.raises(ExportError, match=r"'r', completion 2: a segment with reward 0\.5 in a"):
        to_run([turns(), turns(0.5)])


def test_an_unscored_completion_is_an_error_or_counted_and_never_zero() -> None:
    (group,) = group_rows([scored("a", 1.0, None, 0.0, failures=2), failed_row("a")])
    with pytest.raises(ExportError, match="'a', completion 1: it has no score"):
        to_rollout(group, types=TYPES)
    rollout = to_rollout(group, types=TYPES, unscored="drop")
    assert [run.segments[0].reward for run in rollout.runs] == [1.0, 0.0]
    assert rollout.row_meta == {
        "row_id": "a",
        "dropped": {"unscored": 1, "failed": 2, "failed_row": 1},
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_run([]), "at least one segment"),
        (lambda: to_run([turns(None)]), "it has no score"),
        (lambda: to_sample(turns(), raw_logprobs=[-1.0]), "1 raw logprobs for 2 sampled tokens"),
        (lambda: to_rollout(PromptGroup(key="k", trajectories=())), "no completion is left"),
        (
            lambda: to_rollout(PromptGroup(key="k", trajectories=(turns(None),)), unscored="drop"),
            r"group 'k': no completion is left for a run \(\{'unscored': 1",
        ),
    ],
)
def test_what_a_recipe_would_refuse_is_refused_here(call: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        call()


def test_the_cookbooks_own_code_packs_our_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip(
        "training.utils.rl.rollout.types", reason="needs a checkout of fw-ai/cookbook on the path"
    )
    sdk = pytest.importorskip("fireworks.training.sdk")
    # It imports tinker by name and uses fields that only Fireworks' types of that shape have.
    monkeypatch.setattr(theirs, "tinker", sdk)
    types = CookbookTypes(
        sample=theirs.RolloutSample, run=theirs.RolloutRun, rollout=theirs.Rollout
    )
    for group in prompt_groups():
        packed = theirs.rollout_to_prompt_group(to_rollout(group, types=types))
        assert packed.rewards == group.rewards.tolist()
        assert packed.prompt_lens == [t.prompt_length for t in group.trajectories]
        for datum, logprobs, trajectory in zip(
            packed.data, packed.inf_logprobs, group.trajectories, strict=True
        ):
            tensors = datum.loss_fn_inputs
            assert datum.model_input.to_ints() == trajectory.tokens[:-1].tolist()
            assert tensors["target_tokens"].tolist() == trajectory.tokens[1:].tolist()
            assert tensors["weights"].tolist() == trajectory.loss_mask[1:].tolist()
            assert logprobs == trajectory.logprobs[1:].tolist()
