"""Our losses, advantages and corrections beside those of verl and TRL, on the same random numbers.

    python scripts/peer_formulas.py             prints the worst difference of each
    python scripts/peer_formulas.py --record    also writes what the tests compare with

verl (github.com/volcengine/verl: `verl/trainer/ppo/core_algos.py` and `rollout_corr_helper.py`) and
TRL (github.com/huggingface/trl: `trl/trainer/grpo_trainer.py` and `trl/experimental/gmpo`) must be
installed beside this package, verl with --no-deps and what it imports. The values are those of
their own functions, called as their trainers call them. Of a loss, its value
and its gradient with respect to the logprobs are compared; all in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval_protocol_rft.training import advantages
from eval_protocol_rft.training.losses import (
    Combined,
    Correction,
    IcePop,
    PolicyTensors,
    Rejection,
    SequenceTIS,
    TokenTIS,
    make_loss,
)

RECORD = Path(__file__).parents[1] / "tests" / "fixtures" / "peer_formulas.json"
SEEDS = range(20)
RECORDED = (0, 1)
"""Seeds whose values are recorded."""

Array = NDArray[np.float64]
Batch = Mapping[str, Any]


def draw(seed: int) -> dict[str, Any]:
    """A batch of 6 sequences, 3 groups of 2, at most 9 tokens, with holes; and 4 groups of rewards.
    Plain lists, as they are recorded."""
    rng = np.random.default_rng(seed)
    size, length = 6, 9
    lengths = rng.integers(3, length + 1, size)
    mask = (np.arange(length) < lengths[:, None]) & (rng.random((size, length)) < 0.85)
    mask[:, 0] = True
    old = -rng.exponential(1.0, (size, length))
    rewards = rng.choice([0.0, 0.25, 0.5, 1.0], (4, 5))
    rewards[1] = 0.5  # no variance
    return {
        "mask": mask.tolist(),
        "old": old.tolist(),
        "current": np.minimum(old + rng.normal(0.0, 0.35, old.shape), -1e-3).tolist(),
        "sampler": np.minimum(old + rng.normal(0.0, 0.3, old.shape), -1e-3).tolist(),
        "advantages": rng.normal(0.0, 1.0, size).tolist(),
        "rewards": rewards.tolist(),
        "passes": rng.integers(0, 2, (4, 5)).astype(float).tolist(),
        "lengths": rng.integers(1, 9, (4, 5)).tolist(),
        "baselines": rng.choice([0.0, 0.5, 1.0], 4).tolist(),
    }


@dataclass(frozen=True)
class Pair:
    """A formula of ours, and a peer's."""

    ours: Callable[[Batch], Array]
    theirs: Callable[[Batch], Array]
    peer: str
    function: str


# Losses: [1 + B T] the value, then the gradient.


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.tensor(batch["mask"])
    current = torch.tensor(batch["current"], dtype=torch.float64, requires_grad=True)
    old = torch.tensor(batch["old"], dtype=torch.float64)
    spread = torch.tensor(batch["advantages"], dtype=torch.float64)[:, None].expand_as(old)
    return mask, current, old, spread


def _told(loss: Tensor, logprobs: Tensor) -> Array:
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return np.concatenate([[loss.item()], gradient.numpy().ravel()])


def our_loss(name: str, by: str, **config: float) -> Callable[[Batch], Array]:
    """`by`: `sequence` or `token`, the division."""

    def value(batch: Batch) -> Array:
        mask, current, old, spread = _tensors(batch)
        count = mask.sum(dim=-1, keepdim=True) * len(mask) if by == "sequence" else mask.sum()
        tensors = PolicyTensors(
            logprobs=current,
            sampling_logprobs=old,
            advantages=spread,
            weights=mask.double() / count,
            mask=mask,
        )
        return _told(make_loss(name, config).on_tensors(tensors)[0], current)

    return value


def verl_loss(name: str, mode: str, *, seed: int = 0, **config: Any) -> Callable[[Batch], Array]:
    """`name` as verl's configuration names it."""

    def value(batch: Batch) -> Array:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config import ActorConfig, PolicyLossConfig

        of_loss = {k: v for k, v in config.items() if k in PolicyLossConfig.__dataclass_fields__}
        actor = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            policy_loss=PolicyLossConfig(**of_loss),
            **{k: v for k, v in config.items() if k not in of_loss},
        )
        mask, current, old, spread = _tensors(batch)
        torch.manual_seed(seed)
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=current,
            advantages=spread.clone(),
            response_mask=mask.double(),
            loss_agg_mode=mode,
            config=actor,
        )
        return _told(loss, current)

    return value


def trl_loss(loss_type: str, **config: Any) -> Callable[[Batch], Array]:
    """The loss inside TRL's trainers, whose forward pass is replaced by our logprobs."""

    def value(batch: Batch) -> Array:
        from trl import GRPOTrainer
        from trl.experimental.gmpo import GMPOTrainer

        mask, current, old, spread = _tensors(batch)
        trainer = SimpleNamespace(
            **{
                "loss_type": loss_type,
                "importance_sampling_level": "token",
                "epsilon_low": 0.2,
                "epsilon_high": 0.2,
                "beta": 0.0,
                "top_entropy_quantile": 1.0,
                "off_policy_mask_threshold": None,
                "aux_loss_enabled": False,
                "use_vllm": False,
                "vllm_importance_sampling_correction": False,
                "_entropy_bonus_enabled": False,
                "current_gradient_accumulation_steps": 1,
                "max_completion_length": mask.shape[1],
                "model": SimpleNamespace(training=False),
                "_metrics": defaultdict(lambda: defaultdict(list)),
                "accelerator": SimpleNamespace(
                    gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
                ),
                "args": SimpleNamespace(
                    delta=None,
                    use_bias_correction_kl=False,
                    sapo_temperature_pos=1.0,
                    sapo_temperature_neg=1.05,
                ),
                "_get_per_token_logps_and_entropies": lambda *a, **k: (
                    current,
                    torch.zeros_like(current),
                    None,
                ),
            }
            | config
        )
        kind = GMPOTrainer if loss_type == "gmpo" else GRPOTrainer
        count = len(mask)
        inputs = {
            "prompt_ids": torch.zeros(count, 1, dtype=torch.long),
            "prompt_mask": torch.ones(count, 1, dtype=torch.long),
            "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
            "completion_mask": mask.double(),
            "advantages": spread[:, 0].contiguous(),
            "old_per_token_logps": old,
            "num_items_in_batch": mask.sum().double(),
        }
        return _told(kind._compute_loss(trainer, trainer.model, inputs), current)

    return value


# Advantages: [P G].


def ours_of(estimator: Callable[..., Array], **inputs: str) -> Callable[[Batch], Array]:
    """`inputs`: what the estimator gets besides rewards, and what the batch calls it."""

    def value(batch: Batch) -> Array:
        extra = {name: np.array(batch[key], np.float64) for name, key in inputs.items()}
        rewards = extra.pop("rewards", np.array(batch["rewards"]))
        return estimator(rewards, **extra).ravel()

    return value


def verl_advantage(name: str, *, lengths: bool = False, **given: Any) -> Callable[[Batch], Array]:
    def value(batch: Batch) -> Array:
        from verl.trainer.config import AlgoConfig
        from verl.trainer.ppo.core_algos import get_adv_estimator_fn

        rewards = torch.tensor(batch["rewards"], dtype=torch.float64).flatten()
        index = np.repeat(np.arange(4), 5)
        count = torch.tensor(batch["lengths"]).flatten() if lengths else torch.ones(20)
        mask = (torch.arange(int(count.max())) < count[:, None]).double()
        token_level = torch.zeros_like(mask)
        token_level[:, 0] = rewards
        options = dict(given)
        if name == "remax":
            options["reward_baselines"] = torch.tensor(batch["baselines"]).double()[index]
        config = AlgoConfig(gamma=1.0, norm_adv_by_std_in_grpo=options.pop("by_std", True))
        result, _ = get_adv_estimator_fn(name)(
            token_level_rewards=token_level,
            response_mask=mask,
            index=index,
            config=config,
            **options,
        )
        return result[:, 0].double().numpy()

    return value


# Corrections: [B T] the weights of the sampled tokens, 0 elsewhere.


def our_correction(correction: Correction) -> Callable[[Batch], Array]:
    def value(batch: Batch) -> Array:
        mask, current, old, spread = _tensors(batch)
        tensors = PolicyTensors(
            logprobs=current,
            sampling_logprobs=torch.tensor(batch["sampler"], dtype=torch.float64),
            advantages=spread,
            weights=mask.double(),
            old_logprobs=old,
        )
        return (correction(tensors)[0] * mask).numpy().ravel()

    return value


def verl_correction(**options: Any) -> Callable[[Batch], Array]:
    def value(batch: Batch) -> Array:
        from verl.trainer.ppo.rollout_corr_helper import (
            compute_rollout_correction_and_rejection_mask as compute,
        )

        mask, _, old, _ = _tensors(batch)
        sampler = torch.tensor(batch["sampler"], dtype=torch.float64)
        weights, left, _ = compute(old, sampler, mask.double(), **options)
        factor = weights.batch["rollout_is_weights"] if weights is not None else 1.0
        return (factor * left).numpy().ravel()

    return value


def _correction(correction: Correction, **options: Any) -> Pair:
    function = ", ".join(f"{key}={value}" for key, value in options.items())
    return Pair(our_correction(correction), verl_correction(**options), VERL, function)


def _rejection(kind: str, low: float | None, high: float) -> Pair:
    bounds = f"{1 / high}_{1 / low}" if low is not None else str(high)
    return _correction(
        Rejection(kind=kind, low=low, high=high), rollout_rs=kind, rollout_rs_threshold=bounds
    )


def passk_in_words(batch: Batch) -> Array:
    """The advantages of Pass@k Training from its definition: all subsets of 2."""
    import itertools

    rows = []
    for rewards in batch["passes"]:
        sets = list(itertools.combinations(range(len(rewards)), 2))
        best = np.array([max(rewards[i] for i in chosen) for chosen in sets])
        spread = best.std() + 1e-6
        rows.append(
            [
                np.mean([best[s] for s, chosen in enumerate(sets) if i in chosen]) - best.mean()
                for i in range(len(rewards))
            ]
            / spread
        )
    return np.concatenate(rows)


CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
VERL_CLIP = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
WIDE = {"clip_low_threshold": float(np.exp(-0.4)), "clip_high_threshold": float(np.exp(0.4))}
VERL_WIDE = {"clip_ratio": 0.4, "clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
COVARIANCE = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
PENALTY = {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7}


VERL = "verl"
TRL = "TRL"


def _verl(ours: Callable[[Batch], Array], name: str, mode: str, **config: Any) -> Pair:
    return Pair(ours, verl_loss(name, mode, **config), VERL, f"policy loss {name}")


def _trl(ours: Callable[[Batch], Array], loss_type: str, **config: Any) -> Pair:
    return Pair(ours, trl_loss(loss_type, **config), TRL, f"loss_type {loss_type}")


def _estimator(ours: Callable[[Batch], Array], name: str, **options: Any) -> Pair:
    return Pair(ours, verl_advantage(name, **options), VERL, f"estimator {name}")


def _dppo(name: str, low: float, high: float) -> Pair:
    ours = our_loss(
        name,
        "token",
        divergence_low_threshold=low,
        divergence_high_threshold=high,
        ratio_cap=1.5,
    )
    bounds = {"clip_ratio": high, "clip_ratio_low": low, "clip_ratio_high": high}
    return _verl(ours, name, "token-mean", **bounds, clip_ratio_c=1.5)


def _dapo(by: str) -> Callable[[Batch], Array]:
    return our_loss("dapo", by, **CLIP, dual_clip_threshold=1.4)


PAIRS: Mapping[str, Pair] = {
    "ppo": _verl(
        our_loss("ppo", "token", **CLIP), "vanilla", "token-mean", **VERL_CLIP, clip_ratio_c=1e6
    ),
    "ppo, TRL": _trl(our_loss("ppo", "sequence", **CLIP), "grpo", epsilon_high=0.28),
    "dapo": _verl(_dapo("token"), "vanilla", "token-mean", **VERL_CLIP, clip_ratio_c=1.4),
    "cispo": _verl(our_loss("cispo", "token", **CLIP), "cispo", "token-mean", **VERL_CLIP),
    "cispo, TRL": _trl(
        our_loss("cispo", "token", clip_low_threshold=0.0, clip_high_threshold=1.2),
        "cispo",
        epsilon_high=1.2,
    ),
    "gspo": _verl(our_loss("gspo", "sequence", **CLIP), "gspo", "seq-mean-token-mean", **VERL_CLIP),
    "dro": _verl(our_loss("dro", "token", beta=0.05), "dro", "token-mean", dro_beta=0.05),
    "reinforce": _verl(our_loss("reinforce", "token"), "gpg", "token-mean"),
    "geo_mean": _verl(
        our_loss("geo_mean", "sequence", **WIDE), "geo_mean", "token-mean", **VERL_WIDE
    ),
    "geo_mean, TRL": _trl(
        our_loss("geo_mean", "sequence", **WIDE), "gmpo", epsilon_low=0.4, epsilon_high=0.4
    ),
    "sapo": _verl(
        our_loss("sapo", "sequence", tau_pos=1.0, tau_neg=1.05), "sapo", "seq-mean-token-mean"
    ),
    "sapo, TRL": _trl(our_loss("sapo", "sequence", tau_pos=1.0, tau_neg=1.05), "sapo"),
    "dppo_tv": _dppo("dppo_tv", 0.03, 0.02),
    "dppo_kl": _dppo("dppo_kl", 0.02, 0.001),
    "clip_cov": _verl(
        our_loss("clip_cov", "token", **CLIP, **COVARIANCE, seed=5),
        "clip_cov",
        "token-mean",
        **VERL_CLIP,
        **COVARIANCE,
        seed=5,
    ),
    "kl_cov": _verl(our_loss("kl_cov", "token", **PENALTY), "kl_cov", "token-mean", **PENALTY),
    "advantages.grpo": _estimator(ours_of(advantages.grpo), "grpo"),
    "advantages.dr_grpo": _estimator(
        ours_of(advantages.dr_grpo), "grpo", norm_adv_by_std_in_grpo=False
    ),
    "advantages.rloo": _estimator(ours_of(advantages.rloo), "rloo"),
    "advantages.reinforce_pp": _estimator(
        ours_of(partial(advantages.reinforce_pp, ddof=1)), "reinforce_plus_plus"
    ),
    "advantages.reinforce_pp, baseline": _estimator(
        ours_of(partial(advantages.reinforce_pp, group_baseline=True, ddof=1)),
        "reinforce_plus_plus_baseline",
    ),
    "advantages.opo": _estimator(ours_of(advantages.opo, lengths="lengths"), "opo", lengths=True),
    "advantages.remax": _estimator(ours_of(advantages.remax, baselines="baselines"), "remax"),
    "advantages.gpg": _estimator(ours_of(partial(advantages.gpg, valid="rewards")), "gpg"),
    "advantages.grpo_passk": _estimator(ours_of(advantages.grpo_passk), "grpo_passk"),
    "TokenTIS": _correction(TokenTIS(cap=1.2), rollout_is="token", rollout_is_threshold=1.2),
    "TokenTIS, normalized": _correction(
        TokenTIS(cap=1.2, normalized=True),
        rollout_is="token",
        rollout_is_threshold=1.2,
        rollout_is_batch_normalize=True,
    ),
    "SequenceTIS": _correction(
        SequenceTIS(cap=1.5), rollout_is="sequence", rollout_is_threshold=1.5
    ),
    "SequenceTIS, normalized": _correction(
        SequenceTIS(cap=1.5, normalized=True),
        rollout_is="sequence",
        rollout_is_threshold=1.5,
        rollout_is_batch_normalize=True,
    ),
    "IcePop": _correction(
        IcePop(low=0.8, high=1.3), rollout_is="token", rollout_is_threshold="0.8_1.3"
    ),
    "IcePop, sequence": _correction(
        IcePop(low=0.5, high=1.9, sequence=True),
        rollout_is="sequence",
        rollout_is_threshold="0.5_1.9",
    ),
    "Rejection, token_k1": _rejection("token_k1", 0.7, 1.3),
    "Rejection, token_k2": _rejection("token_k2", None, 0.05),
    "Rejection, token_k3": _rejection("token_k3", None, 0.04),
    "Rejection, seq_sum_k1": _rejection("seq_sum_k1", 0.6, 1.8),
    "Rejection, seq_sum_k2": _rejection("seq_sum_k2", None, 0.25),
    "Rejection, seq_sum_k3": _rejection("seq_sum_k3", None, 0.2),
    "Rejection, seq_mean_k1": _rejection("seq_mean_k1", 0.9, 1.05),
    "Rejection, seq_mean_k2": _rejection("seq_mean_k2", None, 0.04),
    "Rejection, seq_mean_k3": _rejection("seq_mean_k3", None, 0.035),
    "Rejection, seq_max_k2": _rejection("seq_max_k2", None, 0.13),
    "Rejection, seq_max_k3": _rejection("seq_max_k3", None, 0.1),
    "Combined": _correction(
        Combined(parts=(SequenceTIS(cap=1.5), Rejection(kind="token_k2", high=0.05))),
        rollout_is="sequence",
        rollout_is_threshold=1.5,
        rollout_rs="token_k2",
        rollout_rs_threshold=0.05,
    ),
    "advantages.passk": Pair(
        ours_of(partial(advantages.passk, k=2), rewards="passes"),
        passk_in_words,
        "the definition",
        "all subsets of 2",
    ),
}


def worst_difference(pair: Pair) -> float:
    """Largest absolute difference over all seeds."""
    batches = map(draw, SEEDS)
    return max(float(np.abs(pair.ours(batch) - pair.theirs(batch)).max()) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    record = parser.parse_args().record
    torch.set_num_threads(1)
    import trl
    import verl

    versions = {VERL: verl.__version__, TRL: trl.__version__}
    for name, pair in PAIRS.items():
        peer = f"{pair.peer} {versions.get(pair.peer, '')}".strip()
        sys.stdout.write(f"{name:24} {worst_difference(pair):8.1e}  {peer}, {pair.function}\n")
    if record:
        batches = [draw(seed) for seed in RECORDED]
        values = {n: [p.theirs(b).round(12).tolist() for b in batches] for n, p in PAIRS.items()}
        text = json.dumps({"versions": versions, "batches": batches, "values": values})
        RECORD.write_text(text + "\n")


if __name__ == "__main__":
    main()
