"""The parts of the Fireworks loop that decide without asking anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.loop._run_directory import RunFolderError
from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._control_plane import (
    StepSettings,
    deployment_verdict,
    job_verdict,
)
from eval_protocol_rft.loop.fireworks._hot_load import SnapshotChain, replicas_verdict
from eval_protocol_rft.loop.fireworks._iterate import (
    RunState,
    StepReport,
    check_run_name,
    read_state,
    write_state,
)

REPORT = StepReport(step=0, model="m", groups=1, completions=2, mean_score=0.5, dropped={})
FRESH = RunState(run="r", settings={"base_model": "b", "lora_rank": 8})


# The states of a run


@given(steps=st.integers(1, 4), failures=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_every_job_has_its_own_name_and_each_step_trains_one(
    steps: int, failures: list[int]
) -> None:
    state, jobs, starts = FRESH, [], []
    while state.phase != "done":
        assert len(state.reports) == state.step + (state.phase not in ("serve", "generate"))
        match state.phase:
            case "serve":
                state = state.entered("generate")
            case "generate":
                state = state.generated(REPORT)
            case "upload":
                state = state.entered("train")
            case "train":
                jobs.append(state.name)
                if state.attempt < failures[state.step]:
                    state = state.failed("no luck").retried()
                else:
                    starts.append(state.model)
                    state = state.trained(f"model of {state.name}")
            case "clean":
                state = state.cleaned(steps)
    assert len(set(jobs)) == len(jobs) == steps + sum(failures[:steps])
    models = [report.output_model for report in state.reports]
    assert starts == [None, *models[:-1]]
    assert (state.model, len(set(models))) == (models[-1], steps)


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(tmp_path, FRESH) is None
    state = FRESH.generated(REPORT).entered("train").trained("m1").cleaned(3)
    write_state(tmp_path, state)
    assert read_state(tmp_path, FRESH) == state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no state of a run"),
        ('{"run": "r", "settings": {}, "phase": "lunch"}', "is no state of a run"),
        ('{"schema": 9, "run": "r", "settings": {}}', "has layout 9"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=message):
        read_state(tmp_path, FRESH)


@given(st.text(max_size=50))
def test_a_run_name_makes_ids_that_the_service_takes(name: str) -> None:
    try:
        check_run_name(name)
    except ValueError:
        return
    # The rule for ids: a DNS label.
    label = f"{name}-step999-try99"
    assert label.isascii()
    assert len(label) <= 63
    assert label == label.lower()
    assert label[0].isalpha()
    assert all(letter.isalnum() or letter == "-" for letter in label)


@pytest.mark.parametrize("name", ["", "Run", "a_b", "-a", "a-", "1a", "a" * 41, "ü", "a\n"])
def test_other_run_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="begins the ids of resources"):
        check_run_name(name)


# The states of the service


def test_of_all_states_of_a_job_one_is_success() -> None:
    step = pytest.importorskip("fireworks.types.reinforcement_fine_tuning_step")
    annotation = step.ReinforcementFineTuningStep.model_fields["state"].annotation
    (states,) = (get_args(a) for a in get_args(annotation) if get_args(a))
    verdicts = {state: job_verdict(state) for state in states}
    assert [state for state, v in verdicts.items() if v == "done"] == ["JOB_STATE_COMPLETED"]
    failed = {state.removeprefix("JOB_STATE_") for state, v in verdicts.items() if v == "failed"}
    assert failed >= {"FAILED", "CANCELLED", "EXPIRED", "DELETING", "CANCELLING"}
    running = {"CREATING", "RUNNING", "PENDING", "VALIDATING", "WRITING_RESULTS", "RE_QUEUEING"}
    assert all(verdicts[f"JOB_STATE_{state}"] == "wait" for state in running)
    assert job_verdict(None) == job_verdict("JOB_STATE_NEW_TO_US") == "wait"


def test_a_deployment_serves_while_it_is_updated_and_never_after_it_failed() -> None:
    assert [deployment_verdict(s) for s in ("CREATING", "READY", "UPDATING", "FAILED", None)] == [
        "wait",
        "done",
        "done",
        "failed",
        "wait",
    ]


# Hot-loads


def replica(current: str | None, *, ready: bool = True, stage: str = "done") -> dict[str, Any]:
    return {
        "current_snapshot_identity": current,
        "readiness": ready,
        "loading_state": {"stage": stage, "target_snapshot_identity": "new"},
    }


@given(st.lists(st.sampled_from(["new", "old", "loading"]), max_size=5))
def test_a_snapshot_is_loaded_when_every_replica_holds_it_and_is_ready(kinds: list[str]) -> None:
    replicas = {
        "new": replica("new"),
        "old": replica("old"),
        "loading": replica("new", ready=False, stage="loading"),
    }
    verdict, _ = replicas_verdict({"replicas": [replicas[kind] for kind in kinds]}, "new")
    assert verdict == ("done" if kinds and set(kinds) == {"new"} else "wait")


def verdict_on(*replicas: dict[str, Any]) -> str:
    return replicas_verdict({"replicas": list(replicas)}, "new")[0]


def test_an_adapter_among_others_counts_as_held() -> None:
    held = {**replica(None), "loaded_adapters": [{"identity": "new", "status": "loaded"}]}
    assert verdict_on(held) == "done"
    held["loaded_adapters"][0]["status"] = "loading"
    assert verdict_on(held) == "wait"


def test_an_error_counts_where_it_is_about_this_snapshot() -> None:
    stale = replica("old", stage="error")
    assert verdict_on(replica("new"), stale) == "failed"
    stale["loading_state"]["target_snapshot_identity"] = "older"
    assert verdict_on(replica("new"), stale) == "wait"


def test_a_status_without_replicas_is_not_guessed_at() -> None:
    with pytest.raises(TrainerError, match=r"no list of replicas but \['ready'\]"):
        replicas_verdict({"ready": True}, "new")


@given(lora=st.booleans(), outcomes=st.lists(st.booleans(), max_size=8))
def test_a_delta_follows_what_was_seen_to_be_loaded(lora: bool, outcomes: list[bool]) -> None:
    chain, holds = SnapshotChain(lora=lora), None
    for number, succeeded in enumerate(outcomes):
        kind = chain.next_type()
        before = chain.metadata(kind)
        assert (kind == "delta") == (before is not None) == (not lora and holds is not None)
        if before is not None:
            assert before["previous_snapshot_identity"] == holds
        holds = chain.loaded = f"snapshot-{number}" if succeeded else None


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": float("nan")},
        {"max_grad_norm": -1.0},
        {"weight_decay": float("inf")},
    ],
)
def test_settings_of_the_optimizer_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Optimizer(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"lora_rank": 0}, {"epochs": 0}, {"kl_beta": -1.0}, {"batch_size": 0}],
)
def test_step_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StepSettings(**{"learning_rate": 1e-5, "lora_rank": 8, **wrong})  # type: ignore[arg-type]
