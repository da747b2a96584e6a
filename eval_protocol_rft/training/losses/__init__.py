"""Reference losses in torch (extra `local`), for a plain training loop and for custom losses of
the training SDK.

    loss_fn = make_loss(batch.loss_fn, batch.loss_fn_config)
    loss, metrics = loss_fn(batch.datums, token_logprobs(model, batch.datums).logprobs)
    loss.backward()

Or, on a remote trainer: `client.forward_backward_custom(sdk_datums, loss_fn.for_sdk(datums))`.

`policy` holds the losses, `corrections` truncated importance sampling, `kl` the reference penalty,
`metrics` what is reported, `objective` their sum, `adapters` and `forward` the way in from datums.
"""

from eval_protocol_rft.training.losses.corrections import (
    Correction,
    CorrectionWeights,
    IcePop,
    SequenceTIS,
    TokenTIS,
)
from eval_protocol_rft.training.losses.forward import TokenLogprobs, token_logprobs
from eval_protocol_rft.training.losses.objective import POLICY_LOSSES, Objective, make_loss
from eval_protocol_rft.training.losses.policy import (
    CISPO,
    DAPO,
    DRO,
    GSPO,
    PPO,
    ImportanceSampling,
    PolicyLoss,
    Reinforce,
    TokenLoss,
)
from eval_protocol_rft.training.losses.tensors import LossError, PolicyTensors

__all__ = [
    "CISPO",
    "DAPO",
    "DRO",
    "GSPO",
    "POLICY_LOSSES",
    "PPO",
    "Correction",
    "CorrectionWeights",
    "IcePop",
    "ImportanceSampling",
    "LossError",
    "Objective",
    "PolicyLoss",
    "PolicyTensors",
    "Reinforce",
    "SequenceTIS",
    "TokenLogprobs",
    "TokenLoss",
    "TokenTIS",
    "make_loss",
    "token_logprobs",
]
