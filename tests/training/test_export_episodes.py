"""Episodes of several segments on their way out: whole, or refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eval_protocol_rft.training import Segment
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._datums import loss_fn_inputs
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import ExportError
from eval_protocol_rft.training.export import files, fireworks, rl_step, trl, verl
from eval_protocol_rft.training.export.cookbook import to_rollout, to_run, to_sample
from tests.training_episodes import PROMPT, TWO_SEGMENTS, Shape, episodes_row

ONE_SEGMENT: Shape = [[(3, 2), (4, 1)]]
"""Two turns, without a rewrite."""
SEVERAL = "row 'a'.*completion 0: its episode has (2|several) segments"


def rows(*shapes: Shape) -> list[dict[str, Any]]:
    made = list(shapes or (TWO_SEGMENTS, ONE_SEGMENT))
    reasons = ["length"] + ["done"] * (len(made) - 1)
    return [episodes_row("a", made, [1.0] + [0.0] * (len(made) - 1), stop_reasons=reasons)]


def given(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = row["execution_metadata"]["extra"]["trajectories"]
    return found


def test_the_cookbook_gets_a_run_per_episode_with_all_its_segments() -> None:
    made = rows()
    rollout = to_rollout(group_rows(made)[0])
    for run, segments in zip(rollout["runs"], given(made[0]), strict=True):
        assert [s["tokens"] for s in run["segments"]] == [s["tokens"] for s in segments]
        assert [s["loss_mask"] for s in run["segments"]] == [s["loss_mask"] for s in segments]
        for sample, segment in zip(run["segments"], segments, strict=True):
            assert np.array_equal(sample["logprobs"], np.array(segment["logprobs"], np.float32))
    assert [[s["reward"] for s in run["segments"]] for run in rollout["runs"]] == [[1, 1], [0]]
    assert [[s["finish_reason"] for s in run["segments"]] for run in rollout["runs"]] == [
        ["stop", "length"],
        ["stop"],
    ]


def test_only_the_last_segment_of_a_run_is_cut_off_even_where_they_are_the_same() -> None:
    more = Segment(tokens=[1, 2], logprobs=[0, -1], loss_mask=[0, 1])
    (episode, _) = group_rows(rows())[0].trajectories
    run = to_run([msgspec.structs.replace(episode, more=(more, more))])
    assert [s["finish_reason"] for s in run["segments"]] == ["stop", "stop", "length"]


def test_the_cookbook_takes_a_text_and_raw_logprobs_per_segment() -> None:
    (episode, _) = group_rows(rows())[0].trajectories
    run = to_run([episode], texts=["a", "b"], raw_logprobs=[[-1.0] * 5, [-2.0]])
    assert [sample["text"] for sample in run["segments"]] == ["a", "b"]
    assert run["segments"][1]["raw_logprobs"] == [0, 0, 0, 0, -2]
    with pytest.raises(ExportError, match="completion 0: 1 texts for a run of 2 segments"):
        to_run([episode], texts=["a"])
    with pytest.raises(ExportError, match=r"completion 0: its episode has 2 segments.*to_run"):
        to_sample(episode)


def test_the_wire_gets_a_datum_per_segment_and_the_same_sum() -> None:
    made = rows()
    batch = build_batch(made, algorithm="dr_grpo", normalization="sequence")
    folded = [loss_fn_inputs(d, "ppo")["advantages"] for d in batch.datums]
    # Two episodes, advantages 0.5 and -0.5, 6 and 3 sampled tokens.
    for array, weight, segment in zip(
        folded,
        [0.5 / (2 * 6), 0.5 / (2 * 6), -0.5 / (2 * 3)],
        [s for segments in given(made[0]) for s in segments],
        strict=True,
    ):
        expected = [np.float32(weight) * m for m in segment["loss_mask"][1:]]
        assert array.tolist() == pytest.approx(expected, rel=1e-6)
    assert sum(float(a.sum()) for a in folded) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("fireworks") is None, reason="needs the extra `fireworks`"
)
def test_fireworks_gets_a_datum_per_segment() -> None:
    batch = build_batch(rows())
    sent = fireworks.to_datums(batch)
    assert [datum.model_input.to_ints() for datum in sent] == [
        datum.input_tokens.tolist() for datum in batch.datums
    ]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_files_know_which_segment_a_datum_is(suffix: str, tmp_path: Path) -> None:
    batch = build_batch(rows())
    save = getattr(files, f"save_{suffix}")
    save(batch, tmp_path / "batch")
    read = getattr(files, f"load_{suffix}")(tmp_path / "batch")
    assert [(d.completion, d.segment) for d in read.datums] == [(0, 0), (0, 1), (1, 0)]
    for one, other in zip(read.datums, batch.datums, strict=True):
        assert np.array_equal(one.weights, other.weights)


def test_trl_and_verl_refuse_what_they_would_count_twice() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ExportError, match=SEVERAL):
        trl.rollout_result(group_rows(rows()))
    with pytest.raises(ExportError, match=SEVERAL):
        verl.to_tensors(build_batch(rows()), pad_token_id=0)


def test_trl_and_verl_take_episodes_of_one_segment() -> None:
    pytest.importorskip("torch")
    made = rows(ONE_SEGMENT, ONE_SEGMENT)
    result = trl.rollout_result(group_rows(made))
    assert result["prompt_ids"] == [PROMPT] * 2
    assert result["env_mask"] == [[1, 1, 0, 0, 0, 0, 1]] * 2
    assert result["truncated"] == [True, False]
    tensors = verl.to_tensors(build_batch(made), pad_token_id=0).tensors
    assert tensors["response_mask"].tolist() == result["env_mask"]


def test_an_rl_step_refuses_several_turns_as_it_would_tell_of_the_first_alone() -> None:
    with pytest.raises(ExportError, match="row 'a', run 0, completion 1: an episode of 2 turns"):
        rl_step.to_lines(rows([[(3, 2)]], ONE_SEGMENT))


def test_an_rl_step_takes_episodes_of_one_turn() -> None:
    (made,) = rows([[(3, 2)]], [[(3, 1)]])
    made["messages"].append({"role": "assistant", "content": "-"})
    (line,) = rl_step.to_lines([made]).lines
    assert [sample["evals"]["score"] for sample in line["samples"]] == [1.0, 0.0]
