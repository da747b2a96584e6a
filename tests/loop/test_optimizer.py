"""What a step in this process may take: layers computed again, AdamW in 8 bits, master weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from eval_protocol_rft.loop import LoopOptions, SetupError
from eval_protocol_rft.loop._local_trainer import LocalTrainer
from eval_protocol_rft.loop._optimizer import recompute_layers
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.loop._trainer import NamedLoss, TrainerError
from eval_protocol_rft.loop.fireworks import FireworksParts
from eval_protocol_rft.training import losses
from tests.loop.policies import KeptWeights, datums, tiny_model

PLAIN = NamedLoss(loss_fn="importance_sampling")
AGAIN = Optimizer(gradient_checkpointing=True)


def trainer_of(model, **options) -> LocalTrainer:
    return LocalTrainer(model, sink=KeptWeights(), **options)


def saved_bytes(model, batch) -> int:
    """What a forward pass keeps for the backward one, weights aside."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        values = losses.token_logprobs(model, batch)
    assert values.logprobs[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
async def test_layers_computed_again_give_the_same_gradient_to_the_last_bit(lora, dtype) -> None:
    torch.manual_seed(3)
    plain = trainer_of(tiny_model().to(dtype), lora=lora)
    torch.manual_seed(3)
    again = trainer_of(tiny_model().to(dtype), lora=lora, optimizer=AGAIN)
    batch = datums(6)
    for trainer in (plain, again):
        await trainer.forward_backward(batch, PLAIN)
    for name, weight in plain._masters.weights.items():
        other = again._masters.weights[name].grad
        assert weight.grad is not None, name
        assert other is not None, name
        assert torch.equal(weight.grad, other), name
    # And the next pass, after a step, is of the new weights.
    for trainer in (plain, again):
        await trainer.optim_step(learning_rate=0.01)
    pairs = zip(await plain.forward(batch), await again.forward(batch), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_layers_computed_again_are_not_kept() -> None:
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=39, pad_token_id=None,
    )  # fmt: skip
    model, batch = LlamaForCausalLM(config).eval(), datums(8)
    whole = saved_bytes(model, batch)
    recompute_layers(model)
    assert saved_bytes(model, batch) < whole / 4


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(TrainerError, match="--microbatch-tokens"):
        recompute_layers(torch.nn.Linear(2, 2))


async def test_prompts_have_no_logits_with_adapters_either() -> None:
    columns: list[int] = []
    trainer = trainer_of(tiny_model(tied=False), lora=LoraSettings(rank=2))
    trainer._base.lm_head.register_forward_pre_hook(
        lambda module, inputs: columns.append(inputs[0].shape[1])
    )
    (datum,) = datums(1, seed=5)
    await trainer.forward([datum])
    assert columns == [len(datum) - datum.prompt_length + 1]


async def test_8_bits_without_their_package_are_refused_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainerError, match=r"pip install 'eval-protocol-rft\[8bit\]'"):
        trainer_of(tiny_model(), optimizer=Optimizer(variant="adamw_8bit"))


async def test_adamw_in_8_bits_is_adamw_and_goes_on_to_the_last_bit(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")

    async def steps(trainer: LocalTrainer, first: int, last: int) -> None:
        for seed in range(first, last):
            await trainer.forward_backward(datums(4, seed=seed, words=4000), PLAIN)
            await trainer.optim_step(learning_rate=1e-3)

    def model():
        torch.manual_seed(0)
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=4000, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=39, pad_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    small = Optimizer(variant="adamw_8bit")
    plain, straight = trainer_of(model()), trainer_of(model(), optimizer=small)
    began = plain.weights()["lm_head.weight"].clone()
    await steps(plain, 0, 6)
    await steps(straight, 0, 3)
    await straight.save(tmp_path)
    await steps(straight, 3, 6)
    states = straight._optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    moved = plain.weights()["lm_head.weight"] - began
    error = straight.weights()["lm_head.weight"] - plain.weights()["lm_head.weight"]
    assert error.norm() < 0.2 * moved.norm()
    resumed = trainer_of(model(), optimizer=small)
    await resumed.load(tmp_path)
    await steps(resumed, 3, 6)
    for name, value in straight.weights().items():
        assert torch.equal(value, resumed.weights()[name]), name


async def test_fireworks_decides_by_itself_what_a_step_may_take() -> None:
    parts = FireworksParts(base_model="m", deployment="d", optimizer=AGAIN)
    with pytest.raises(SetupError, match="training shape"):
        await parts.make(lambda row: row, {"model": "m"}, LoopOptions(steps=1))


def test_what_only_saves_memory_is_no_setting_of_the_run() -> None:
    assert AGAIN.settings() == Optimizer().settings()
    assert Optimizer(variant="adamw_8bit").settings() != Optimizer().settings()
