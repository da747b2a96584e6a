"""Which tensors a loss on the wire is given: what the Fireworks SDK and Tinker have in common.

Invariant: the sum over tokens that the server computes from these tensors is the loss that
`datums` describes, or there is an `ExportError`.

The losses of reinforcement learning take no mask and no weights. They are all of the form
A * f(logprob, sampling logprob), and clipping compares such products, so they scale with a positive
factor on the advantage A: mask and normalisation are folded into the advantages, once, by
`TrainingDatum.folded_advantages`. A position that was not sampled has advantage 0.0, and no part in
the loss.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._errors import ExportError

FOLDED_LOSSES = frozenset(
    {"ppo", "cispo", "importance_sampling", "gspo", "dapo", "reinforce"},
)
"""Losses without weights that scale with a positive factor on the advantage."""


def loss_fn_inputs(datum: TrainingDatum, loss_fn: str) -> dict[str, NDArray[Any]]:
    """The tensors of one datum for `loss_fn`, all of length T.

    `cross_entropy` gets `target_tokens` and `weights`: the advantages take no part, so this is
    for supervised training, and for custom losses, which know the advantages by themselves.

    Raises:
        ExportError: the loss is not known, or would act on more than the sampled tokens.
    """
    if loss_fn == "cross_entropy":
        return {"target_tokens": datum.target_tokens, "weights": datum.weights}
    inputs: dict[str, NDArray[Any]] = {
        "target_tokens": datum.target_tokens,
        "logprobs": datum.logprobs,
    }
    if loss_fn in FOLDED_LOSSES:
        return {**inputs, "advantages": datum.folded_advantages()}
    if loss_fn == "dro":
        _check_dro(datum)
        return {**inputs, "advantages": datum.advantages}
    raise ExportError(
        f"loss_fn {loss_fn!r} is unknown: "
        f"one of {', '.join(sorted({*FOLDED_LOSSES, 'cross_entropy', 'dro'}))}"
    )


def build_datum(datum: TrainingDatum, inputs: dict[str, NDArray[Any]], types: Any) -> Any:
    """`types.Datum` of the SDK whose module `types` is."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.input_tokens.tolist()), loss_fn_inputs=inputs
    )


def _check_dro(datum: TrainingDatum) -> None:
    """-sum(lp * A - beta / 2 (lp - q)^2) has a term without the advantage. Where nothing was
    sampled q is the stand-in 0.0, so it would train the policy to be certain of its prompts."""
    name = f"row {datum.row_id!r}, completion {datum.completion}"
    if not datum.mask.all():
        raise ExportError(
            f"{name}: the built-in dro acts on every position and takes no mask, and "
            f"{int((~datum.mask).sum())} of {len(datum)} positions were not sampled. Use "
            'forward_backward_custom(to_datums(batch, loss_fn="cross_entropy"), '
            'make_loss("dro", batch.loss_fn_config).for_sdk(batch.datums))'
        )
    if not (datum.weights == 1).all():
        raise ExportError(
            f"{name}: the built-in dro takes no weights, and its penalty does not scale with the "
            'advantage: build the batch with normalization="none"'
        )
