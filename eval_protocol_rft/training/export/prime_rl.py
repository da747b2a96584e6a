"""`TrainingSample`s of prime-rl (`prime_rl.transports.rollouts.types`), which its trainer's
`prepare_batch` packs into micro batches.

    samples = prime_rl.to_samples(batch, temperature=1.0)
    grid = prepare_batch(samples, seq_len, num_train_workers, bin_cost)

Invariant: all arrays have the length of `token_ids`, each value at the very token that it is about;
prime-rl shifts by itself. `mask` is True exactly on sampled tokens.

prime-rl trains each sequence by advantages per token, which are the batch's own; so episodes of
several segments count once. It divides by the number of tokens that train, over all ranks, so the
batch must not be normalised already.
"""

from __future__ import annotations

from typing import Any

from eval_protocol_rft.training._batch import TrainingBatch
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._types import ExportError, require


def to_samples(
    batch: TrainingBatch,
    *,
    temperature: float,
    env_name: str = "eval-protocol",
    seq_len: int | None = None,
    types: Any = None,
) -> list[Any]:
    """[datums] `TrainingSample`s, in the order of the batch.

    Args:
        batch: built with `normalization="none"`.
        temperature: what was sampled with. prime-rl divides logits by it, at every token.
        env_name: how its metrics call these samples.
        seq_len: of prime-rl, which cuts what is longer without a word; with it, that is refused.
        types: what has `TrainingSample`; default the module `prime_rl.transports.rollouts.types`.

    Raises:
        MissingPackageError: prime-rl is not installed, and no types are given.
        ExportError: the batch is normalised, a sequence has more than `seq_len` tokens, the
            temperature is not above 0, or the name is one that prime-rl keeps for itself.
    """
    if batch.normalization != "none":
        raise ExportError(
            f'the batch has normalization="{batch.normalization}" in its weights, and prime-rl '
            'divides by the tokens that train: build it with normalization="none"'
        )
    if not temperature > 0:
        raise ExportError(f"temperature is {temperature}: prime-rl divides logits by it")
    if env_name == "all":
        raise ExportError('env_name="all" is prime-rl\'s own, for all environments together')
    module = types or require(
        "prime_rl.transports.rollouts.types",
        install="git+https://github.com/PrimeIntellect-ai/prime-rl",
    )
    for datum in batch.datums:
        if seq_len is not None and len(datum) + 1 > seq_len:
            raise ExportError(
                f"{datum.name}: it has {len(datum) + 1} tokens, seq_len is {seq_len}, and prime-rl "
                "would cut it. Filters(max_sequence_tokens=) leaves such completions out"
            )
    return [_sample(datum, temperature, env_name, module.TrainingSample) for datum in batch.datums]


def _sample(datum: TrainingDatum, temperature: float, env_name: str, kind: Any) -> Any:
    # The first token follows nothing: nothing predicts it.
    return kind(
        token_ids=[int(datum.input_tokens[0]), *datum.target_tokens.tolist()],
        mask=[False, *datum.mask.tolist()],
        logprobs=[0.0, *datum.logprobs.tolist()],
        # At every token: prime-rl reads the temperature where the prediction is made, one before
        # the token that was sampled.
        temperatures=[float(temperature)] * (len(datum) + 1),
        env_name=env_name,
        advantages=[0.0, *datum.advantages.tolist()],
    )
