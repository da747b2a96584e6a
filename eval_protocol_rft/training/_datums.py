"""One training example in target-token coordinates: how per-token losses are weighed, what a loss
on the wire is given, and how far a trainer's logprobs of it are from the sampler's.

Invariant: all arrays of a datum have length T = N-1 for a sequence of N tokens; position t is about
predicting token t+1 from tokens 0..t. Positions that the policy did not sample (prompt, tool
output) hold 0.0 in `logprobs`, `advantages` and `weights`; every sampled token, the end-of-turn
token included, is a target.

How a consumer reads a datum. The loss of a batch is

    sum over datums, sum over t of   weights[t] * loss_t(advantages[t], logprobs[t], ...)

and nothing divides it again. `advantages` is the bare estimate, the same at every sampled token of
a sequence, in all its segments. `weights` is the loss mask times the normalisation factor, so
`weights != 0` is the mask. With `normalization="none"`, the default, `weights` is exactly the 0/1
mask and the trainer divides, once; with any other choice the division is already in `weights` and
the trainer must not divide again.

The losses of reinforcement learning on the wire (`loss_fn_inputs`) take no mask and no weights.
All but dro are of the form A * f(logprob, sampling logprob), and clipping compares such products,
so they scale with a positive factor on the advantage A: mask and normalisation are folded into the
advantages, once, by `folded_advantages()`. A position that was not sampled has advantage 0.0, and
no part in the loss. dro has a term beside the advantage: it is sent unweighted, or refused.

Sampler and trainer are compared (`measure`) on tokens that both should give the same probability:
only groups of the very weights in training count, so that what is measured is a fault of the setup
and never the policy's own progress. k1 and k3 estimate KL(sampler || trainer) from d = trainer -
sampler logprob of sampled tokens: k1 = -d, k3 = exp(d) - 1 - d (J. Schulman, "Approximating KL
Divergence", 2020).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._segments import FloatArray, IntArray, Segment
from eval_protocol_rft.sampling import Completion
from eval_protocol_rft.training._types import NO_COMPONENTS, ExportError, Trajectory

Normalization = Literal["none", "token", "sequence", "constant"]
"""Factor of the weights of a sequence with T_i sampled tokens, in a batch of S sequences. An
episode of several segments is one sequence, T_i its sampled tokens in all of them, and the factor
the same in each of its datums:

- none: 1. The loss is a sum over tokens; the trainer divides.
- token: 1 / sum_i T_i. The mean over all sampled tokens (DAPO).
- sequence: 1 / (S T_i). The mean over sequences of the mean over their tokens (GRPO).
- constant: 1 / (S L), with one L for the whole run (Dr.GRPO): no length bias.
"""


class TrainingDatum(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """One segment of a sequence, ready for a loss. T = N-1 targets.

    A sequence has one segment, unless it is an episode whose history was rewritten between turns:
    then each of its datums has its reward and its advantage.

    The arrays are views into buffers shared with other datums, and `input_tokens` and
    `target_tokens` overlap: read them, copy before you write.
    """

    input_tokens: IntArray
    """[T] int64, tokens[:-1]."""
    target_tokens: IntArray
    """[T] int64, tokens[1:]."""
    logprobs: FloatArray
    """[T] float32, sampling logprobs (nats) of the targets; 0.0 where not sampled."""
    advantages: FloatArray
    """[T] float32, the advantage at sampled targets; 0.0 elsewhere. Holds no normalisation."""
    weights: FloatArray
    """[T] float32, loss mask times normalisation factor: 0.0 where not sampled, and a positive
    constant of this sequence at sampled targets (1.0 with `normalization="none"`)."""
    prompt_length: int
    """Tokens before the first sampled one: `target_tokens[prompt_length - 1]` is the first sampled
    token. Between further turns stand tokens that were not sampled; `mask` knows them."""
    reward: float
    """The reward that the advantage came from, after shaping."""
    truncated: bool
    """The completion, or the last turn of the episode, was cut off at max_tokens."""
    group: int
    """Index of the prompt group within its batch."""
    row_id: str | None
    """The dataset row it came from."""
    completion: int
    """Place among the completions asked for in that row's rollout."""
    segment: int = 0
    """Place among the segments of its episode."""
    components: Mapping[str, float | None] = NO_COMPONENTS
    """The further scores that the advantage came from, by name; None where there is none. Empty
    where it came from the reward, and in batches that were read from files."""
    routing_matrices: Sequence[str] | None = None
    """[T] base64, how a mixture of experts routed the prediction of each target when it was
    sampled, for router replay; "" where that is not known. None: not known of any."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"row {self.row_id!r}, completion {self.completion}"

    def __len__(self) -> int:
        """T, the number of targets."""
        return len(self.target_tokens)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[T] True at sampled targets: where the loss acts."""
        mask: NDArray[np.bool_] = self.weights != 0
        return mask

    def folded_advantages(self) -> FloatArray:
        """[T] advantages * weights, for a consumer without a weights input. A new array."""
        return self.advantages * self.weights


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    groups: Sequence[int],
    *,
    normalization: Normalization,
    constant_length: int | None = None,
    components: Sequence[str] = (),
) -> list[TrainingDatum]:
    """Bring S scored sequences into target coordinates.

    Tokens and logprobs are views of the segments' own arrays, and so are the weights where they
    are the bare loss mask. What is new lies in one buffer for the whole batch.

    Args:
        trajectories: [S] the sequences, in order.
        advantages: [S]
        groups: [S] index of the prompt group of each.
        normalization: how the loss is divided.
        constant_length: L of the constant normalisation, in tokens.
        components: names of the further scores that the advantages came from.

    Returns:
        A datum per segment; those of one sequence stand together.
    """
    size = sum(map(target_count, trajectories))
    sampled = np.array([trajectory.total_sampled for trajectory in trajectories], np.int64)
    factors = weight_factors(sampled, normalization, constant_length)
    spread_out = np.zeros(size, np.float32)
    weights = np.zeros(0 if normalization == "none" else size, np.float32)
    datums: list[TrainingDatum] = []
    stop = 0
    for trajectory, advantage, group, factor in zip(
        trajectories, advantages, groups, factors, strict=True
    ):
        assert trajectory.reward is not None  # noqa: S101 - filters leave what is scored
        named = {name: trajectory.components.get(name) for name in components} or NO_COMPONENTS
        for place, segment in enumerate(trajectory.segments):
            routing = segment.routing_matrices
            start, stop = stop, stop + len(segment.tokens) - 1
            if normalization != "none":
                spread(factor, segment, weights[start:stop])
            spread(advantage, segment, spread_out[start:stop])
            datums.append(
                TrainingDatum(
                    input_tokens=segment.tokens[:-1],
                    target_tokens=segment.tokens[1:],
                    logprobs=segment.logprobs[1:],
                    advantages=spread_out[start:stop],
                    weights=(
                        segment.loss_mask[1:] if normalization == "none" else weights[start:stop]
                    ),
                    prompt_length=segment.prompt_length,
                    reward=float(trajectory.reward),
                    truncated=trajectory.truncated,
                    group=group,
                    row_id=trajectory.row_id,
                    completion=trajectory.completion,
                    segment=place,
                    components=named,
                    routing_matrices=None if routing is None else list(routing[1:]),
                )
            )
    return datums


def target_count(trajectory: Trajectory) -> int:
    """Targets of the datums that a sequence gives."""
    return sum(len(segment.tokens) - 1 for segment in trajectory.segments)


def spread(value: float, segment: Segment, zeros: FloatArray) -> None:
    """Write `value` at the sampled targets of a segment, into [T] zeros."""
    prompt = segment.prompt_length
    if prompt + segment.num_sampled == len(segment.tokens):
        zeros[prompt - 1 :] = value  # one run of sampled tokens, up to the end
    else:
        np.multiply(segment.loss_mask[1:], np.float32(value), out=zeros)


def weight_factors(
    sampled: IntArray, normalization: Normalization, constant_length: int | None
) -> FloatArray:
    """[S] float32 factor of each sequence, from its number of sampled tokens."""
    if normalization == "none":
        factors = np.ones(len(sampled))
    elif normalization == "token":
        factors = np.full(len(sampled), 1.0 / max(int(sampled.sum()), 1))
    elif normalization == "sequence":
        factors = 1.0 / (len(sampled) * sampled)
    elif constant_length is None:
        raise ValueError('normalization="constant" needs constant_length')
    else:
        factors = np.full(len(sampled), 1.0 / (len(sampled) * constant_length))
    return factors.astype(np.float32)


FOLDED_LOSSES = frozenset(
    {"ppo", "cispo", "importance_sampling", "gspo", "dapo", "reinforce"},
)
"""Losses without weights that scale with a positive factor on the advantage."""
WIRE_LOSSES = FOLDED_LOSSES | {"cross_entropy", "dro"}
"""Losses that have a name on the wire, and a formula that is published or known from the service's
cookbook. Its `dppo` has none."""


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
        f"loss_fn {loss_fn!r} has no name on the wire, which knows "
        f"{', '.join(sorted(WIRE_LOSSES))}: use forward_backward_custom(to_datums(batch, "
        'loss_fn="cross_entropy"), make_loss(batch.loss_fn, batch.loss_fn_config)'
        ".for_sdk(batch.datums))"
    )


def build_datum(datum: TrainingDatum, inputs: dict[str, NDArray[Any]], types: Any) -> Any:
    """`types.Datum` of the SDK whose module `types` is. Routing matrices are in its `ModelInput`,
    where that has a place for them, as Fireworks' has."""
    fields: dict[str, Any] = {}
    if datum.routing_matrices is not None and "routing_matrices" in types.ModelInput.model_fields:
        fields["routing_matrices"] = list(datum.routing_matrices)
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.input_tokens.tolist(), **fields),
        loss_fn_inputs=inputs,
    )


def _check_dro(datum: TrainingDatum) -> None:
    """-sum(lp * A - beta / 2 (lp - q)^2) has a term without the advantage. Where nothing was
    sampled q is the stand-in 0.0, so it would train the policy to be certain of its prompts."""
    if not datum.mask.all():
        raise ExportError(
            f"{datum.name}: the built-in dro acts on every position and takes no mask, and "
            f"{int((~datum.mask).sum())} of {len(datum)} positions were not sampled. Use "
            'forward_backward_custom(to_datums(batch, loss_fn="cross_entropy"), '
            'make_loss("dro", batch.loss_fn_config).for_sdk(batch.datums))'
        )
    if not (datum.weights == 1).all():
        raise ExportError(
            f"{datum.name}: the built-in dro takes no weights, and its penalty does not scale with "
            'the advantage: build the batch with normalization="none"'
        )


WARN_K3 = 2e-3
FAIL_K3 = 1.5e-2
"""Mean k3 over tokens. Between engines of different precision (bfloat16 kernels) it is below the
first; importance ratios stop meaning anything beyond the second."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer are apart."""

    tokens: int
    k1: float
    k3: float
    max_difference: float
    """Of the logprobs of one token, nats."""
    beyond: float
    """Share of the tokens whose probabilities are more than 1 % apart: ratios between 0.99 and 1.01
    are what two kernels of one precision may differ by."""

    @property
    def mean_ratio(self) -> float:
        """Mean of exp(trainer - sampler), each difference capped: 1 where the policies are one."""
        return 1.0 + self.k3 - self.k1

    @property
    def verdict(self) -> Literal["pass", "warn", "fail"]:
        return "fail" if self.k3 > FAIL_K3 else "warn" if self.k3 > WARN_K3 else "pass"


def measure(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> Mismatch | None:
    """Compare (sampler, trainer) logprobs of sampled tokens, per datum; None without tokens."""
    if not any(len(sampler) for sampler, _ in pairs):
        return None
    sampler = np.concatenate([pair[0] for pair in pairs]).astype(np.float64)
    trainer = np.concatenate([pair[1] for pair in pairs]).astype(np.float64)
    difference = trainer - sampler
    # Capped as in the losses: one absurd token must not hide behind an infinity.
    k3 = np.expm1(np.minimum(difference, 20.0)) - difference
    return Mismatch(
        tokens=len(sampler),
        k1=float(-difference.mean()),
        k3=float(k3.mean()),
        max_difference=float(np.abs(difference).max()),
        beyond=float((np.abs(np.expm1(np.minimum(difference, 20.0))) > 0.01).mean()),
    )


def unscored(prompt: Sequence[int], completion: Completion) -> Trajectory:
    """A completion that is compared and not trained on."""
    sampled = np.repeat(np.array([0.0, 1.0], np.float32), [len(prompt), len(completion.token_ids)])
    return Trajectory(
        tokens=np.array([*prompt, *completion.token_ids], np.int64),
        logprobs=np.array([0.0] * len(prompt) + completion.logprobs, np.float32),
        loss_mask=sampled,
        reward=None,
        finish_reason=completion.finish_reason,
        policy_version=completion.policy_version,
        first_policy_version=completion.first_policy_version,
        row_id="of a probe",
    )


def comparable(trajectories: Sequence[Trajectory]) -> list[TrainingDatum]:
    """Datums to run through a trainer's forward pass, for `sampled_pairs`; all of group 0."""
    scored = [msgspec.structs.replace(trajectory, reward=0.0) for trajectory in trajectories]
    return pack(scored, [1.0] * len(scored), [0] * len(scored), normalization="none")


def sampled_pairs(
    datums: Sequence[TrainingDatum], logprobs: Sequence[FloatArray], groups: Collection[int]
) -> list[tuple[FloatArray, FloatArray]]:
    """(sampler, trainer) logprobs of the sampled tokens of datums in `groups`."""
    return [
        (datum.logprobs[datum.mask], values[datum.mask])
        for datum, values in zip(datums, logprobs, strict=True)
        if datum.group in groups
    ]


def looks_shifted(pairs: Sequence[tuple[FloatArray, FloatArray]]) -> bool:
    """Whether the sampler's logprobs fit the trainer's one token further on, or back."""
    long = [(s, t) for s, t in pairs if len(s) > 1]
    for left, right in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        moved = measure([(s[left], t[right]) for s, t in long])
        if moved is not None and moved.verdict == "pass":
            return True
    return False


def missing_eos(
    datums: Sequence[TrainingDatum], eos_token_ids: Collection[int], *, stops: bool
) -> int:
    """Datums whose last turn ended by itself and not with an end token. With stop strings (`stops`)
    it may."""
    if stops or not eos_token_ids:
        return 0
    return sum(
        not datum.truncated and int(datum.target_tokens[datum.mask][-1]) not in eos_token_ids
        for datum in datums
    )
