"""What trainers that estimate advantages by themselves get, against their types written by hand."""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from eval_protocol_rft.training import (
    PromptGroup,
    Segment,
    Trajectory,
    build_batch,
    group_rows,
)
from eval_protocol_rft.training._types import ExportError, MissingPackageError
from eval_protocol_rft.training.export import areal, nemo_rl, openrlhf, prime_rl, skyrl, slime, trl
from tests.training_batches import batch_of, prompt_groups
from tests.training_rows import failed_row, scored

pytest.importorskip("torch")


@dataclasses.dataclass
class TrajectoryID:
    """As in skyrl/train/generators/base.py."""

    instance_id: str
    repetition_id: int


@dataclasses.dataclass(kw_only=True)
class Sample:
    """The fields of slime/utils/types.py that are filled."""

    class Status(enum.Enum):
        COMPLETED = "completed"
        TRUNCATED = "truncated"

    group_index: int
    index: int
    rollout_id: int
    tokens: list[int]
    response_length: int
    reward: float
    loss_mask: list[int]
    weight_versions: list[str]
    rollout_log_probs: list[float]
    status: Status
    metadata: dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class TrainingSample:
    """The fields of prime_rl/transports/rollouts/types.py that are filled."""

    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    temperatures: list[float]
    env_name: str
    advantages: list[float]


SKYRL = SimpleNamespace(TrajectoryID=TrajectoryID)
SLIME = SimpleNamespace(Sample=Sample)
PRIME_RL = SimpleNamespace(TrainingSample=TrainingSample)
NEMO_RL = SimpleNamespace(BatchedDataDict=dict)
OPENRLHF = SimpleNamespace(Experience=dict)

Export = Callable[[list[PromptGroup]], Any]
EXPORTS: dict[str, Export] = {
    "SkyRL": lambda groups: skyrl.to_samples(groups, types=SKYRL),
    "slime": lambda groups: slime.to_samples(groups, types=SLIME),
    "AReaL": areal.to_samples,
    "NeMo-RL": lambda groups: nemo_rl.to_samples(groups, types=NEMO_RL),
    "OpenRLHF": lambda groups: openrlhf.to_samples(groups, types=OPENRLHF),
}
ONE_SEQUENCE = sorted({*EXPORTS} - {"SkyRL"})
"""Those that take an episode of one segment alone."""
EQUAL_GROUPS = ["slime", "AReaL", "OpenRLHF"]
"""Those that cut their batch into groups of one size."""


def one_turn(completion: int = 0, **fields: Any) -> Trajectory:
    return Trajectory(
        **{
            "tokens": [1, 2, 3],
            "logprobs": [0, 0, -0.5],
            "loss_mask": [0, 0, 1],
            "reward": 1.0,
            "row_id": "r",
            "completion": completion,
            **fields,
        }
    )


def two_turns(completion: int = 1, **fields: Any) -> Trajectory:
    """Two turns with a tool's output between them, and an environment's last word behind."""
    return Trajectory(
        **{
            "tokens": [4, 5, 6, 7, 8, 9],
            "logprobs": [0, -1, 0, -2, -3, 0],
            "loss_mask": [0, 1, 0, 1, 1, 0],
            "reward": 0.0,
            "row_id": "r",
            "completion": completion,
            "finish_reason": "length",
            "policy_version": "8",
            "first_policy_version": "7",
            **fields,
        }
    )


def group(*trajectories: Trajectory, key: str = "k") -> PromptGroup:
    return PromptGroup(key=key, trajectories=trajectories)


def plain(value: Any) -> Any:
    """Tensors as lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def test_skyrl_by_hand() -> None:
    assert skyrl.to_samples([group(one_turn(), two_turns())], types=SKYRL) == {
        "prompt_token_ids": [[1, 2], [4]],
        "response_ids": [[3], [5, 6, 7, 8]],
        "rewards": [1.0, 0.0],
        "loss_masks": [[1], [1, 0, 1, 1]],
        "stop_reasons": ["stop", "length"],
        "rollout_logprobs": [[-0.5], [-1.0, 0.0, -2.0, -3.0]],
        "trajectory_ids": [TrajectoryID("k", 0), TrajectoryID("k", 1)],
        "is_last_step": [True, True],
        "rollout_metrics": None,
        "rollout_expert_indices": None,
    }


def test_segments_of_an_episode_are_steps_of_skyrl() -> None:
    more = Segment(tokens=[20, 21], logprobs=[0, -0.25], loss_mask=[0, 1])
    output = skyrl.to_samples([group(two_turns(more=(more, more)), one_turn(1))], types=SKYRL)
    assert output["prompt_token_ids"] == [[4], [20], [20], [1, 2]]
    assert output["response_ids"] == [[5, 6, 7, 8], [21], [21], [3]]
    assert output["rewards"] == [0.0, 0.0, 0.0, 1.0]
    assert output["stop_reasons"] == ["stop", "stop", "length", "stop"]
    assert output["is_last_step"] == [False, False, True, True]
    assert [each.repetition_id for each in output["trajectory_ids"]] == [0, 0, 0, 1]


def test_skyrl_gets_the_ids_back_that_it_asked_with() -> None:
    ids = [TrajectoryID("a", 0), TrajectoryID("a", 1), TrajectoryID("b", 0), TrajectoryID("b", 1)]
    groups = group_rows([scored("x", 1.0, 0.0), scored("y", 0.0, 0.5)])
    assert skyrl.to_samples(groups, trajectory_ids=ids)["trajectory_ids"] == ids


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ("aab", r"'k' has 2 completions and would stand at trajectories 2 to 3 of 3"),
        ("abbb", r"trajectories 0 to 1 of 4, which are not that many of one instance"),
        ("aabbc", "asked for 5 trajectories, there are 4 completions"),
    ],
)
def test_completions_that_skyrl_did_not_ask_for_are_refused(instances: str, message: str) -> None:
    ids = [TrajectoryID(instance, 0) for instance in instances]
    with pytest.raises(ExportError, match=message):
        skyrl.to_samples([group(one_turn(), one_turn(1))] * 2, trajectory_ids=ids)


def test_slime_by_hand() -> None:
    groups = [group(one_turn()), group(two_turns(), key="l")]
    assert slime.to_samples(groups, types=SLIME) == [
        [
            Sample(
                group_index=0,
                index=0,
                rollout_id=0,
                tokens=[1, 2, 3],
                response_length=1,
                reward=1.0,
                loss_mask=[1],
                weight_versions=[],
                rollout_log_probs=[-0.5],
                status=Sample.Status.COMPLETED,
                metadata={"row_id": "r", "completion": 0},
            )
        ],
        [
            Sample(
                group_index=1,
                index=1,
                rollout_id=1,
                tokens=[4, 5, 6, 7, 8],
                response_length=4,
                reward=0.0,
                loss_mask=[1, 0, 1, 1],
                weight_versions=["7", "8"],
                rollout_log_probs=[-1.0, 0.0, -2.0, -3.0],
                status=Sample.Status.TRUNCATED,
                metadata={"row_id": "r", "completion": 1},
            )
        ],
    ]


def test_prime_rl_by_hand() -> None:
    """Advantages of the batch, the same in each segment; the temperature at every token."""
    more = Segment(tokens=[20, 21], logprobs=[0, -0.25], loss_mask=[0, 1])
    batch = build_batch([group(one_turn(), two_turns(more=(more,)))], algorithm="dr_grpo")
    samples = prime_rl.to_samples(batch, temperature=0.7, env_name="sums", types=PRIME_RL)
    assert samples == [
        TrainingSample(
            token_ids=[1, 2, 3],
            mask=[False, False, True],
            logprobs=[0.0, 0.0, -0.5],
            temperatures=[0.7] * 3,
            env_name="sums",
            advantages=[0.0, 0.0, 0.5],
        ),
        TrainingSample(
            token_ids=[4, 5, 6, 7, 8, 9],
            mask=[False, True, False, True, True, False],
            logprobs=[0.0, -1.0, 0.0, -2.0, -3.0, 0.0],
            temperatures=[0.7] * 6,
            env_name="sums",
            advantages=[0.0, -0.5, 0.0, -0.5, -0.5, 0.0],
        ),
        TrainingSample(
            token_ids=[20, 21],
            mask=[False, True],
            logprobs=[0.0, -0.25],
            temperatures=[0.7] * 2,
            env_name="sums",
            advantages=[0.0, -0.5],
        ),
    ]
    assert {type(value) for sample in samples for value in sample.mask} == {bool}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: prime-rl divides"),
        ({"env_name": "all"}, 'env_name="all" is prime-rl'),
        ({"seq_len": 4}, "'r', completion 1: it has 6 tokens, seq_len is 4, .* would cut it"),
        ({"normalization": "token"}, 'normalization="token" .* prime-rl divides'),
    ],
)
def test_what_prime_rl_would_change_is_refused(options: dict[str, Any], message: str) -> None:
    normalization = options.pop("normalization", "none")
    batch = build_batch([group(one_turn(), two_turns())], normalization=normalization)
    with pytest.raises(ExportError, match=message):
        prime_rl.to_samples(batch, types=PRIME_RL, **{"temperature": 1.0, **options})
    assert len(prime_rl.to_samples(batch_of(prompt_groups()), temperature=1, types=PRIME_RL)) == 12


def test_areal_by_hand() -> None:
    turns = two_turns(first_policy_version=None)
    (tensors,) = areal.to_samples([group(one_turn(policy_version="7"), turns)])
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "input_ids": [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]],
        "loss_mask": [[0, 0, 1, 0, 0], [0, 1, 0, 1, 1]],
        "logprobs": [[0, 0, -0.5, 0, 0], [0, -1, 0, -2, -3]],
        "attention_mask": [[True, True, True, False, False], [True] * 5],
        "rewards": [1.0, 0.0],
        "versions": [[-1, -1, 7, 0, 0], [-1, 8, -1, 8, 8]],
    }
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "input_ids": "torch.int32",
        "loss_mask": "torch.int32",
        "logprobs": "torch.float32",
        "attention_mask": "torch.bool",
        "rewards": "torch.float32",
        "versions": "torch.int32",
    }


def test_areal_has_versions_where_they_are_known() -> None:
    assert "versions" not in areal.to_samples([group(one_turn())])[0]
    (counted,) = areal.to_samples([group(one_turn(policy_version="step-3"))], version=3)
    assert counted["versions"].tolist() == [[-1, -1, 3]]
    assert "versions" not in areal.to_samples([group(two_turns())], versions=False)[0]


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([two_turns()], "'r', completion 1: policy versions 7 to 8 sampled it"),
        ([one_turn(policy_version="step-3")], "completion 0: its policy version is 'step-3'"),
        ([one_turn(policy_version="3"), one_turn(1)], "completion 1: its policy version is None"),
    ],
)
def test_versions_that_areal_cannot_count_are_refused(
    trajectories: list[Trajectory], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        areal.to_samples([group(*trajectories)])


def test_nemo_rl_by_hand() -> None:
    groups = [group(one_turn()), group(two_turns(), key="l")]
    batch = plain(nemo_rl.to_samples(groups, types=NEMO_RL, task_name="sums"))
    assert batch == {
        "message_log": [
            [
                {"role": "user", "content": "", "token_ids": [1, 2]},
                {
                    "role": "assistant",
                    "content": "",
                    "token_ids": [3],
                    "generation_logprobs": [-0.5],
                },
            ],
            [
                {"role": "user", "content": "", "token_ids": [4]},
                {
                    "role": "assistant",
                    "content": "",
                    "token_ids": [5],
                    "generation_logprobs": [-1.0],
                },
                {"role": "environment", "content": "", "token_ids": [6]},
                {
                    "role": "assistant",
                    "content": "",
                    "token_ids": [7, 8],
                    "generation_logprobs": [-2.0, -3.0],
                },
            ],
        ],
        "length": [2, 1],
        "total_reward": [1.0, 0.0],
        "truncated": [False, True],
        "loss_multiplier": [1.0, 1.0],
        "idx": [0, 1],
        "task_name": ["sums", "sums"],
        "extra_env_info": [{"row_id": "r", "completion": 0}, {"row_id": "r", "completion": 1}],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [group(one_turn()), group(one_turn(), key="l")],
            "groups 'k' and 'l' have the same prompt ids, and NeMo-RL would take them for one",
        ),
        ([group(one_turn(), two_turns())], "'r', completion 1: its prompt ids are not those"),
    ],
)
def test_groups_that_nemo_rl_would_merge_or_split_are_refused(
    groups: list[PromptGroup], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        nemo_rl.to_samples(groups, types=NEMO_RL)


def test_openrlhf_by_hand() -> None:
    _, experience = openrlhf.to_samples([group(one_turn(), two_turns())], types=OPENRLHF)
    assert plain(experience) == {
        "sequences": [[4, 5, 6, 7, 8]],
        "attention_mask": [[1, 1, 1, 1, 1]],
        "action_mask": [[1, 0, 1, 1]],
        "rollout_log_probs": [[-1.0, 0.0, -2.0, -3.0]],
        "prompts": [""],
        "labels": [""],
        "images": [None],
        "mm_train_inputs": [None],
        "rewards": [0.0],
        "scores": [0.0],
        "response_length": [4],
        "truncated": [True],
        "total_length": [5.0],
        "info": {"reward": [0.0], "score": [0.0], "response_clip_ratio": [True]},
    }


def test_the_result_of_an_agent_of_openrlhf_by_hand() -> None:
    result = openrlhf.to_result(group(two_turns(reward=0.5)), prompt="2+2=", label="4")
    assert result == {
        "prompt": "2+2=",
        "label": "4",
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": [4, 5, 6, 7, 8],
        "action_ranges": [(1, 2), (3, 5)],
        "rollout_log_probs": [0.0, -1.0, 0.0, -2.0, -3.0],
        "truncated": True,
        "reward": 0.5,
        "scores": 0.5,
        "extra_logs": {},
    }
    with pytest.raises(ExportError, match="'k' has 2 completions, and an agent of OpenRLHF"):
        openrlhf.to_result(group(one_turn(), one_turn(1)), prompt="", label="")


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no prompt groups for NAME"),
        ([scored("a", 1.0, 0.0, failures=1)], "1 of its completions or rows failed, and NAME"),
        ([scored("a", 1.0), failed_row("b")], "NAME has no place .* the first: no server"),
        ([scored("a", 1.0, None)], "row 'a', completion 1: it has no score, and NAME needs one"),
        (
            [scored("a", 1.0, 0.0, top_p=0.9, support_truncated=True)],
            r"row 'a', completion 0: truncated support \(top_p=0.9, top_k=0\), and NAME takes",
        ),
        ([scored("a", 1.0, 0.0, temperature=0.0)], "temperature=0: greedy .* NAME"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(name: str, rows: list[Any], message: str) -> None:
    with pytest.raises(ExportError, match=message.replace("NAME", name)):
        EXPORTS[name](group_rows(rows))


@pytest.mark.parametrize("name", [*EXPORTS, "TRL"])
def test_groups_that_no_one_policy_sampled_are_refused(name: str) -> None:
    export = {**EXPORTS, "TRL": trl.rollout_result}[name]
    other = msgspec.structs.replace(one_turn(), tokens=np.array([7, 2, 3]), model="m2")
    with pytest.raises(ExportError, match="2 models, 1 of 'm1', 1 of 'm2'"):
        export([group(one_turn(model="m1")), group(other, key="l")])
    one, two = group(one_turn()), group(other, key="l")
    named = [dataclasses.replace(one, tokenizer="a"), dataclasses.replace(two, tokenizer="b")]
    with pytest.raises(ExportError, match="'k' was tokenized with 'a', group 'l' with 'b'"):
        export(named)


@pytest.mark.parametrize("name", [*EXPORTS, "TRL"])
def test_failures_that_over_sampling_made_up_for_are_none(name: str) -> None:
    export = {**EXPORTS, "TRL": trl.rollout_result}[name]
    (complete,) = group_rows([scored("a", 1.0, 0.0, failures=1)])
    export([dataclasses.replace(complete, asked=2)])
    with pytest.raises(ExportError, match=f"{name} has no place for a missing completion"):
        export([complete])


@pytest.mark.parametrize("name", EXPORTS)
def test_a_completion_for_a_baseline_alone_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match=f"completion 1: .* baseline .* {name} cannot"):
        EXPORTS[name]([group(one_turn(), one_turn(1, trains=False))])


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_an_episode_of_several_segments_is_refused(name: str) -> None:
    more = Segment(tokens=[20, 21], logprobs=[0, -0.25], loss_mask=[0, 1])
    with pytest.raises(ExportError, match=f"row 'r', completion 0: .* 2 segments, and {name}"):
        EXPORTS[name]([group(one_turn(more=(more,)), one_turn(1))])


@pytest.mark.parametrize("name", EQUAL_GROUPS)
def test_groups_of_several_sizes_are_refused(name: str) -> None:
    groups = [group(one_turn(), one_turn(1)), group(one_turn(), key="l")]
    with pytest.raises(ExportError, match=f"'l' has 1 completions, group 'k' has 2: {name} cuts"):
        EXPORTS[name](groups)


@pytest.mark.parametrize(
    ("package", "export"),
    [
        ("skyrl", skyrl.to_samples),
        ("slime", slime.to_samples),
        ("nemo_rl", nemo_rl.to_samples),
        ("openrlhf", openrlhf.to_samples),
        ("prime_rl", lambda groups: prime_rl.to_samples(batch_of(groups), temperature=1.0)),
    ],
)
def test_a_trainer_that_is_not_there_is_named(
    package: str, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    groups = [group(one_turn(), one_turn(1, reward=0.0))]
    with pytest.raises(MissingPackageError, match=f"{package}.* is needed here.*pip install"):
        export(groups)
