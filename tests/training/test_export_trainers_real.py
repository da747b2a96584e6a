"""Trainers' own packages read what we made for them: every number comes out as it went in.

`scripts/trainers.sh FOLDER` makes an environment with their sources, and runs this there.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from eval_protocol_rft.training import (
    PromptGroup,
    Segment,
    TrainingBatch,
    Trajectory,
    advantages,
    build_batch,
)
from eval_protocol_rft.training.export import areal, nemo_rl, openrlhf, prime_rl, skyrl, slime
from tests import trainers

pytestmark = pytest.mark.trainers
if not trainers.FOLDER:
    pytest.skip(trainers.MISSING, allow_module_level=True)
torch = pytest.importorskip("torch")

PAD = 0


@pytest.fixture(autouse=True, scope="module")
def sources() -> Iterator[None]:
    with trainers.sources():
        yield


def trajectory(rng: np.random.Generator, prompt: list[int], completion: int) -> Trajectory:
    """One to three turns with tool output between them, sometimes with some behind the last."""
    mask = [0] * len(prompt)
    for turn in range(int(rng.integers(1, 4))):
        mask += [0] * (int(rng.integers(1, 3)) if turn else 0) + [1] * int(rng.integers(1, 5))
    if completion % 3 == 2:
        mask += [0, 0]
    tokens = prompt + rng.integers(1, 30_000, len(mask) - len(prompt)).tolist()
    return Trajectory(
        tokens=tokens,
        logprobs=[float(-3 * rng.random()) if m else 0.0 for m in mask],
        loss_mask=mask,
        reward=float(rng.normal()),
        finish_reason="length" if completion == 1 else "stop",
        policy_version="5",
        row_id="row",
        completion=completion,
    )


def groups_of(count: int = 3, size: int = 4) -> list[PromptGroup]:
    rng = np.random.default_rng(7)
    groups = []
    for g in range(count):
        prompt = rng.integers(1, 30_000, int(rng.integers(1, 6))).tolist()
        each = [trajectory(rng, prompt, completion) for completion in range(size)]
        groups.append(PromptGroup(key=f"group-{g}", trajectories=tuple(each)))
    return groups


GROUPS = groups_of()
ALL = [trajectory for group in GROUPS for trajectory in group.trajectories]
REWARDS = np.array([group.rewards for group in GROUPS])


def kept(segment: Segment) -> slice:
    """Without what was said behind the last sampled token."""
    return slice(int(np.flatnonzero(segment.loss_mask)[-1]) + 1)


def test_skyrl() -> None:
    base = importlib.import_module("skyrl.train.generators.base")
    checks = importlib.import_module("skyrl.train.utils.trainer_utils")
    output = skyrl.to_samples(GROUPS)
    assert set(output) <= set(base.GeneratorOutput.__annotations__)
    checks.validate_generator_output(len(ALL), output)
    data = trained_by_skyrl(output, step_wise=False)
    for i, each in enumerate(ALL):
        whole = kept(each)
        size = whole.stop - each.prompt_length
        attended = data["attention_mask"][i].bool()
        assert data["sequences"][i][attended].tolist() == each.tokens[whole].tolist()
        response = slice(each.prompt_length, whole.stop)
        for name, values in (("rollout_logprobs", each.logprobs), ("loss_mask", each.loss_mask)):
            padded = data[name][i]
            assert padded[-size:].tolist() == values[response].tolist()
            assert not padded[:-size].any()
        assert data["rewards"][i].sum() == np.float32(each.reward)
        assert data["rewards"][i, -1] == np.float32(each.reward)
        assert data["loss_mask"][i, -1] == 1
    ours = advantages.grpo(REWARDS, ddof=1).ravel()
    theirs = data["advantages"][:, -1]
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_steps_of_skyrl_share_the_advantage_of_their_episode() -> None:
    checks = importlib.import_module("skyrl.train.utils.trainer_utils")
    more = Segment(tokens=[20, 21, 22], logprobs=[0, 0, -0.25], loss_mask=[0, 0, 1])
    groups = [
        PromptGroup(
            key=group.key,
            trajectories=tuple(
                msgspec.structs.replace(t, more=(more,) * (t.completion % 3))
                for t in group.trajectories
            ),
        )
        for group in GROUPS
    ]
    steps = [len(t.segments) for group in groups for t in group.trajectories]
    output = skyrl.to_samples(groups)
    checks.validate_generator_output(len(ALL), output, step_wise=True)
    with pytest.raises(AssertionError, match="Mismatch between prompts"):
        checks.validate_generator_output(len(ALL), output, step_wise=False)
    data = trained_by_skyrl(output, step_wise=True)
    assert len(data["sequences"]) == sum(steps)
    ours = np.repeat(advantages.grpo(REWARDS, ddof=1).ravel(), steps)
    np.testing.assert_allclose(data["advantages"][:, -1], ours, atol=1e-5)


def trained_by_skyrl(output: Any, *, step_wise: bool) -> Any:
    """What SkyRL's trainer makes of it, advantages included."""
    module = importlib.import_module("skyrl.train.trainer")
    config = importlib.import_module("skyrl.train.config.config").SkyRLTrainConfig()
    config.generator.step_wise_trajectories = config.generator.merge_stepwise_output = step_wise
    config.generator.n_samples_per_prompt = len(GROUPS[0])
    config.trainer.train_batch_size = config.trainer.policy_mini_batch_size = len(GROUPS)
    config.trainer.algorithm.advantage_estimator = "grpo"
    trainer = object.__new__(module.RayPPOTrainer)
    trainer.cfg, trainer.all_metrics = config, {}
    trainer.tokenizer = SimpleNamespace(pad_token_id=PAD)
    trainer.dispatch = SimpleNamespace(get_lcm_dp_size=lambda: 1)
    uids = [each.instance_id for each in output["trajectory_ids"]]
    output, uids = trainer.postprocess_generator_output(output, uids)
    data = trainer.convert_to_training_input(output, uids)
    data["values"] = None  # of a critic
    return trainer.compute_advantages_and_returns(data)


def test_slime() -> None:
    rollout = importlib.import_module("slime.ray.rollout")
    checks = importlib.import_module("slime.observability.rollout_data_utils")
    samples = slime.to_samples(GROUPS)
    checks.validate_rollout_id_annotated(samples)
    flat = [sample for group in samples for sample in group]
    for sample in flat:
        sample._validate_response_metadata_lengths()
        assert type(sample).from_dict(sample.to_dict()) == sample
    manager = object.__new__(rollout.RolloutManager.__ray_metadata__.modified_class)
    manager.args = SimpleNamespace(
        reward_key=None,
        advantage_estimator="grpo",
        rewards_normalization=True,
        grpo_std_normalization=True,
        n_samples_per_prompt=len(GROUPS[0]),
        rollout_batch_size=len(GROUPS),
        rollout_top_p=1.0,
    )
    manager.custom_convert_samples_to_train_data_func = None
    manager.custom_reward_post_process_func = None
    data = manager._convert_samples_to_train_data(flat)
    metrics = importlib.import_module("slime.observability.rollout_metrics")
    manager.args.log_reward_category = None
    logged = metrics.compute_metrics_from_samples(manager.args, flat)
    assert logged["truncated_ratio"] == sum(each.truncated for each in ALL) / len(ALL)
    for i, each in enumerate(ALL):
        response = slice(each.prompt_length, kept(each).stop)
        assert data["tokens"][i] == each.tokens[kept(each)].tolist()
        assert data["response_lengths"][i] == response.stop - response.start
        assert data["loss_masks"][i] == each.loss_mask[response].tolist()
        assert data["rollout_log_probs"][i] == each.logprobs[response].tolist()
    assert data["raw_reward"] == [each.reward for each in ALL]
    assert data["truncated"] == [int(each.truncated) for each in ALL]
    assert len({*data["rollout_ids"]}) == len(ALL)
    np.testing.assert_allclose(data["rewards"], advantages.grpo(REWARDS, ddof=1).ravel(), atol=1e-5)


def prime_rl_batch() -> TrainingBatch:
    more = Segment(tokens=[20, 21, 22], logprobs=[0, 0, -0.25], loss_mask=[0, 0, 1])
    first = msgspec.structs.replace(GROUPS[0].trajectories[0], more=(more,))
    group = PromptGroup(key="group-0", trajectories=(first, *GROUPS[0].trajectories[1:]))
    return build_batch([group, *GROUPS[1:]])


def test_prime_rl(tmp_path: Path) -> None:
    packing = importlib.import_module("prime_rl.trainer.batch")
    files = importlib.import_module("prime_rl.transports.rollouts.filesystem")
    batch = prime_rl_batch()
    samples = prime_rl.to_samples(batch, temperature=0.7, seq_len=64)
    grid = packing.prepare_batch(samples, 64, 1, bin_cost=sum)
    asyncio.run(files.FileSystemMicroBatchSender(tmp_path, 1).send(grid))
    (received,) = [files.FileSystemMicroBatchReceiver(tmp_path, 0).receive()]
    found = {tuple(tokens): values for tokens, *values in unpacked(received)}
    assert len(found) == len(batch.datums)
    for datum in batch.datums:
        tokens = (int(datum.input_tokens[0]), *datum.target_tokens.tolist())
        mask, logprobs, credit, temperatures = found[tokens]
        assert mask == [False, *datum.mask.tolist()]
        assert logprobs == [0.0, *datum.logprobs.tolist()]
        assert credit == [0.0, *datum.advantages.tolist()]
        assert {*temperatures} == {0.7}


def unpacked(micro_batches: list[Any]) -> Iterator[tuple[list[Any], ...]]:
    for each in micro_batches:
        stop = 0
        for length in each.sequence_lengths:
            start, stop = stop, stop + length
            names = ("input_ids", "loss_mask", "inference_logprobs", "advantages", "temperatures")
            yield tuple(getattr(each, name)[start:stop] for name in names)


def test_areal() -> None:
    data = importlib.import_module("areal.utils.data")
    executor = importlib.import_module("areal.infra.workflow_executor")
    tensors = areal.to_samples(GROUPS)
    for group in tensors:
        assert executor.check_trajectory_format(group, batch_size=len(GROUPS[0]))
    single = [areal.to_samples([PromptGroup(key=0, trajectories=(each,))])[0] for each in ALL]
    joined = data.concat_padded_tensors(tensors)
    for name, tensor in data.concat_padded_tensors(single).items():
        assert torch.equal(joined[name], tensor), name
        assert joined[name].dtype == tensor.dtype
    result = trained_by_areal(tensors)
    for i, each in enumerate(ALL):
        whole, mask = kept(each), each.loss_mask[kept(each)] != 0
        row = result[i]
        assert row["input_ids"][row["attention_mask"]].tolist() == each.tokens[whole].tolist()
        # Rolled by one, to where each token is predicted.
        acts = row["loss_mask"].bool()
        assert acts[: whole.stop - 1].tolist() == mask[1:].tolist()
        assert not acts[whole.stop - 1 :].any()
        assert row["logprobs"][acts].tolist() == each.logprobs[whole][mask].tolist()
        assert row["versions"][: whole.stop].tolist() == np.where(mask, 5, -1).tolist()
        np.testing.assert_allclose(row["advantages"][acts], row["ours"], atol=1e-5)


def trained_by_areal(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each completion as AReaL's actor trains on it, with our advantage of it."""
    actors = importlib.import_module("areal.trainer.ppo.actor")
    args = importlib.import_module("areal.api.cli_args")
    norm = args.NormConfig(
        mean_level="group",
        std_level="group",
        group_size=len(GROUPS[0]),
        std_unbiased=True,
        eps=1e-6,
    )
    config = args.PPOActorConfig(
        experiment_name="e", trial_name="t", reward_norm=norm, adv_norm=None,
        kl_ctl=0.0, reward_scaling=1.0, reward_bias=0.0,
    )  # fmt: skip
    computed = actors.PPOActor(config, engine=None).compute_advantages(tensors)
    ours = advantages.grpo(REWARDS, ddof=1)
    return [
        {
            "ours": ours[g, i],
            **{name: computed[g][name][i] for name in tensors[g]},
            "advantages": computed[g]["advantages"][i],
        }
        for g in range(len(GROUPS))
        for i in range(len(GROUPS[g]))
    ]


def test_nemo_rl() -> None:
    messages = importlib.import_module("nemo_rl.data.llm_message_utils")
    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    utils = importlib.import_module("nemo_rl.algorithms.utils")
    batch = nemo_rl.to_samples(GROUPS)
    assert batch.size == len(ALL)
    batch = type(batch).from_batches([batch.slice(0, 5), batch.slice(5, len(ALL))])
    grpo.add_grpo_token_loss_masks_and_generation_logprobs(batch["message_log"])
    flat, lengths = messages.batched_message_log_to_flat_message(
        batch["message_log"], pad_value_dict={"token_ids": PAD}
    )
    for i, each in enumerate(ALL):
        whole = kept(each)
        assert int(lengths[i]) == whole.stop
        for name, values in (
            ("token_ids", each.tokens),
            ("token_loss_mask", each.loss_mask),
            ("generation_logprobs", each.logprobs),
        ):
            assert flat[name][i, : whole.stop].tolist() == values[whole].tolist()
            assert not flat[name][i, whole.stop :].any()
    assert batch["truncated"].tolist() == [each.truncated for each in ALL]
    logs = grpo.extract_initial_prompt_messages(batch["message_log"], batch["length"])
    prompts, _ = messages.batched_message_log_to_flat_message(logs)
    baseline, _ = utils.calculate_baseline_and_std_per_prompt(
        prompts["token_ids"], batch["total_reward"], torch.ones(len(ALL))
    )
    np.testing.assert_allclose(
        batch["total_reward"] - baseline, advantages.rloo(REWARDS).ravel(), atol=1e-6
    )


def test_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    types = importlib.import_module("openrlhf.trainer.ppo_utils.experience")
    samples = openrlhf.to_samples(GROUPS)
    experiences = trained_by_openrlhf(samples)
    buffers = importlib.import_module("openrlhf.trainer.ppo_utils.replay_buffer")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    buffer = buffers.NaiveReplayBuffer(sample_batch_size=2)
    for experience in experiences:
        buffer.append(experience)
    assert len(buffer) == len(ALL)
    ours = advantages.grpo(REWARDS, ddof=1).ravel()
    for item, each, advantage in zip(buffer.items, ALL, ours, strict=True):
        whole = kept(each)
        acts = item.action_mask.bool()
        assert item.sequences.tolist() == each.tokens[whole].tolist()
        assert acts.tolist() == (each.loss_mask[whole] != 0)[1:].tolist()
        assert item.rollout_log_probs.tolist() == each.logprobs[whole][1:].tolist()
        assert item.rewards == np.float32(each.reward)
        assert item.truncated == each.truncated
        np.testing.assert_allclose(item.advantages[acts], advantage, atol=1e-5)
    batch = types.make_experience_batch(buffer.items)
    assert batch.sequences.shape[0] == len(ALL)


def trained_by_openrlhf(samples: list[Any]) -> list[Any]:
    """What OpenRLHF's experience maker makes of it; its models' logprobs are 0."""
    makers = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=5, n_samples_per_prompt=len(GROUPS[0])),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm", gamma=1.0)),
        reward=SimpleNamespace(
            clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None
        ),
    )
    maker = object.__new__(makers.RemoteExperienceMaker)
    maker.args = args
    maker.strategy = SimpleNamespace(args=args)
    maker.tokenizer = SimpleNamespace(pad_token_id=PAD)
    maker.kl_ctl = SimpleNamespace(value=0.0)
    maker.advantage_estimator = "group_norm"
    batches = maker.split_rollout_samples(samples)
    for batch in batches:
        batch.kl = torch.zeros(batch.action_mask.shape)
    return maker.compute_advantages_and_returns(batches)


def test_what_an_agent_of_openrlhf_returns_becomes_the_same_experience() -> None:
    generators = importlib.import_module("openrlhf.trainer.ppo_utils.samples_generator")
    generator = object.__new__(generators.SamplesGenerator)
    for each, experience in zip(ALL, openrlhf.to_samples(GROUPS), strict=True):
        result = openrlhf.to_result(PromptGroup(key=0, trajectories=(each,)), prompt="", label="")
        theirs = generator._process_response_into_experience(result, max_len=4096)
        for name, value in vars(theirs).items():
            ours = getattr(experience, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, ours), name
                assert value.dtype == ours.dtype, name
            elif name != "info":
                assert value == ours, name
