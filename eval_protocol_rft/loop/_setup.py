"""What a run is made of: which model, where it is sampled, and who trains it.

Invariant: sampler and trainer begin with the same weights, and the sampler is this run's own or a
server that the user named; no other user of a shared sampler sees its weights change.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from annotated_types import Ge, Lt

from eval_protocol_rft import rollout
from eval_protocol_rft._options import check_options
from eval_protocol_rft.local.models import NoSuchModelError, has_tokenizer, local_model_folder
from eval_protocol_rft.loop._options import HOW, MODEL, SetupError
from eval_protocol_rft.sampling import RefusedError
from eval_protocol_rft.scoring import parameters_of, sets_of

if TYPE_CHECKING:
    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.loop._lora import LoraSettings
    from eval_protocol_rft.loop._options import LoopOptions
    from eval_protocol_rft.loop._trainer import Trainer
    from eval_protocol_rft.loop._weights import ServedWeights
    from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor, RolloutRequest
    from eval_protocol_rft.sampling import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that depends on where sampling and training happen."""

    trainer: Trainer
    processor: FireworksTrainingRolloutProcessor
    request: RolloutRequest
    params: dict[str, Any]
    """completion_params of training rollouts."""
    sampler: LocalSampler | None = None
    eos_token_ids: Collection[int] = ()
    max_concurrency: int | None = None
    publish_first: bool = False
    """The sampler may hold other weights than the trainer when a run begins."""
    tokenizer: Any = None
    """A transformers tokenizer, to be saved beside the final weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW's settings for a `LocalTrainer`."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1), HOW()] = 0.99
    """Of AdamW."""
    eps: Annotated[float, Ge(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0), HOW()] = 0.0
    """Of AdamW, on matrices."""
    max_grad_norm: Annotated[float | None, Ge(0), HOW()] = 1.0
    """Longer gradients are cut; 0: never."""
    microbatch_tokens: Annotated[int, Ge(1)] = 16384

    def __post_init__(self) -> None:
        check_options(self)

    def settings(self) -> dict[str, Any]:
        """As a run's settings have them."""
        values = asdict(self)
        betas = (values.pop("beta1"), values.pop("beta2"))
        return {"betas": betas, **values, "max_grad_norm": self.max_grad_norm or None}


def rollout_params(
    evaluator: Callable[..., Any],
    given: Mapping[str, Any] | None,
    *,
    model: str | None,
    options: LoopOptions,
) -> dict[str, Any]:
    """completion_params to train with: the test's own, what the caller changed, n and seed.

    Raises:
        SetupError: the test has several sets of completion_params, or samples greedily.
        ParamsError: they are wrong.
    """
    sets = sets_of(parameters_of(evaluator), "completion_params")
    if len(sets) > 1 and given is None and model is None:
        raise SetupError(
            f"the evaluation test has {len(sets)} sets of completion_params: choose a model"
        )
    params = {**(sets[0] if len(sets) == 1 else {}), **(given or {})}
    if model is not None:
        params["model"] = model
    if options.completions_per_prompt is not None:
        params["n"] = options.completions_per_prompt
    request = rollout.parse_completion_params(params)
    if request.params.temperature == 0:
        raise SetupError("completion_params sample greedily (temperature 0): nothing to learn from")
    if request.n < 2 and options.batch.relative:
        raise SetupError(
            f"{options.algorithm} compares the completions of a prompt, and completion_params "
            f"ask for n={request.n}: set n, or completions_per_prompt"
        )
    if request.endpoint is None:
        # A seed draws the same tokens here; other servers may not take one.
        params.setdefault("seed", options.seed)
    return params


def own_processor(evaluator: Callable[..., Any]) -> FireworksTrainingRolloutProcessor:
    """The processor of the evaluation test.

    Raises:
        SetupError: it is none that can be pointed at the policy in training.
    """
    from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor

    test = parameters_of(evaluator)
    if test is None:
        return FireworksTrainingRolloutProcessor()
    processor = test.rollout_processor
    if not isinstance(processor, FireworksTrainingRolloutProcessor):
        raise SetupError(
            f"the evaluation test rolls out with {type(processor).__name__}, which keeps no "
            "tokens: set rollout_processor=FireworksTrainingRolloutProcessor(...) on it"
        )
    return processor


class MakeParts(Protocol):
    """Where sampling and training happen: here, as `LocalParts` says, or as `FireworksParts`."""

    def settings(self) -> dict[str, Any]:
        """What of it changes the curve; plain JSON values."""
        ...

    async def make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        """The parts of a run. `params`: completion_params of training rollouts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParts:
    """Training in this process, for `train(parts=...)`."""

    weights: Annotated[Path | None, MODEL()] = None
    """Folder of the weights that the server serves."""
    lora: LoraSettings | None = None
    """Train adapters instead of all parameters."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    trust_remote_code: Annotated[bool, MODEL()] = False
    """Let the model's folder run its own code."""

    def settings(self) -> dict[str, Any]:
        return {
            "weights": None if self.weights is None else str(self.weights),
            "lora": None if self.lora is None else asdict(self.lora),
            "optimizer": self.optimizer.settings(),
        }

    async def make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        """Load the model and put sampler and trainer together.

        Raises:
            SetupError: weights are missing, or superfluous.
            RefusedError: there is no such model, or torch is missing.
        """
        return await asyncio.to_thread(self._make, evaluator, params, options)

    def _make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        from eval_protocol_rft.local import LocalSampler
        from eval_protocol_rft.loop._local_trainer import LocalTrainer
        from eval_protocol_rft.loop._weights import SamplerWeights, WeightSink

        request = rollout.parse_completion_params(params)
        processor = own_processor(evaluator)
        local = request.endpoint is None
        if local and self.weights is not None:
            raise SetupError("weights= is for a server's; a local/... model names its own")
        if not local and self.weights is None:
            raise SetupError(
                f"{request.params.model} is sampled from a server: name the folder of its weights "
                "(--weights), which are trained here and sent there"
            )
        if self.weights is not None:
            params = with_tokenizer_of(self.weights, params, processor)
            request = rollout.parse_completion_params(params)
        try:
            source = str(local_model_folder(request.params.model) if local else self.weights)
        except NoSuchModelError as error:
            raise RefusedError(str(error)) from error
        loaded = LocalSampler.from_pretrained(
            source, trust_remote_code=self.trust_remote_code, policy_version="step-0"
        )
        sink: WeightSink
        if request.endpoint is None:
            sink = SamplerWeights(loaded)
            processor = processor.sampling_from(loaded)
        else:
            sink = served_weights(request.endpoint)
        optimizer = self.optimizer
        trainer = LocalTrainer(
            loaded.model,
            sink=sink,
            temperature=request.params.temperature,
            lora=self.lora,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm or None,
            microbatch_tokens=optimizer.microbatch_tokens,
            keep_reference=options.kl_beta > 0,
        )
        return Parts(
            trainer=trainer,
            processor=processor,
            request=request,
            params=params,
            sampler=loaded if local else None,
            eos_token_ids={
                *loaded.eos_token_ids,
                *request.params.extra.get("stop_token_ids", ()),
            },
            max_concurrency=_UNBOUNDED if local else None,
            publish_first=not local,
            tokenizer=loaded.tokenizer,
        )


def with_tokenizer_of(
    weights: str | os.PathLike[str],
    params: dict[str, Any],
    processor: FireworksTrainingRolloutProcessor,
) -> dict[str, Any]:
    """completion_params with the tokenizer that lies beside the weights, where none is named.

    Raises:
        SetupError: there is no such folder.
    """
    if not os.path.isdir(weights):
        raise SetupError(f"{os.fspath(weights)}: no folder of weights is there (--weights)")
    named = (
        rollout.parse_completion_params(params).tokenizer is not None or processor.names_tokenizer
    )
    if named or not has_tokenizer(weights):
        return params
    return {**params, "tokenizer": os.fspath(weights)}


def served_weights(endpoint: Endpoint) -> ServedWeights:
    """Where the weights of the server at `endpoint` go."""
    from eval_protocol_rft.loop._weights import ServedWeights

    key = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    return ServedWeights(endpoint.base_url, headers={**key, **dict(endpoint.headers)})


_UNBOUNDED = 1 << 20
"""Completions in flight in this process: the sampler's own queue bounds what runs."""
