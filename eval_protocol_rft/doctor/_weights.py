"""Logprobs of sampled tokens under the weights in a folder, in float32: the trainer's side.

Imports torch; `run` imports it when there are weights at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import Completion, TokenIds
from eval_protocol_rft.training import TrainingDatum
from eval_protocol_rft.training.losses import token_logprobs

_AT_ONCE = 8
"""Sequences per forward."""


class WeightsError(EvalProtocolRftError, ValueError):
    """The weights cannot be loaded, or are not of the model that sampled."""


def trainer_logprobs(
    weights: str | Path,
    samples: Sequence[tuple[TokenIds, Completion]],
    *,
    temperature: float,
    trust_remote_code: bool = False,
) -> list[list[float]]:
    """[T_i] logprobs (nats) of each sample's completion, by a teacher-forced forward: the one that
    a training step makes. Blocks.

    Raises:
        WeightsError: no weights there, or an id was sampled that their vocabulary does not have.
    """
    try:
        model = _loaded(weights, trust_remote_code)
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot load {str(weights)!r}: {error}") from error
    size = model.get_input_embeddings().num_embeddings
    for prompt, completion in samples:
        highest = max(*prompt, *completion.token_ids)
        if highest >= size:
            raise WeightsError(
                f"id {highest} is outside the vocabulary of {str(weights)!r} ({size} ids): these "
                "are weights of another model"
            )
    found: list[list[float]] = []
    with torch.no_grad():
        for start in range(0, len(samples), _AT_ONCE):
            datums = [_datum(*sample) for sample in samples[start : start + _AT_ONCE]]
            logprobs = token_logprobs(model, datums, temperature=temperature).logprobs
            for datum, values in zip(datums, logprobs, strict=True):
                found.append(values[datum.prompt_length - 1 :].tolist())
    return found


def _loaded(weights: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            weights, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    finally:
        if shown:
            bars.enable_progress_bar()
    model.train(False)
    return model


def _datum(prompt: TokenIds, completion: Completion) -> TrainingDatum:
    tokens = np.array([*prompt, *completion.token_ids], np.int64)
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[len(prompt) - 1 :] = 1.0
    logprobs = np.zeros_like(weights)
    logprobs[len(prompt) - 1 :] = completion.logprobs
    return TrainingDatum(
        input_tokens=tokens[:-1],
        target_tokens=tokens[1:],
        logprobs=logprobs,
        advantages=np.zeros_like(weights),
        weights=weights,
        prompt_length=len(prompt),
        reward=0.0,
        truncated=completion.truncated,
        group=0,
        row_id=None,
        completion=0,
    )
