"""What a run is made of: which model, where it is sampled, and who trains it.

Invariant: sampler and trainer begin with the same weights, and the sampler is this run's own or a
server that the user named; no other user of a shared sampler sees its weights change.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from annotated_types import Ge

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.engine import Engine, VllmOptions
from eval_protocol_rft.local.models import (
    LOCAL_PREFIX,
    VLLM_PREFIX,
    NoSuchModelError,
    has_tokenizer,
    local_model_folder,
    vllm_source,
)
from eval_protocol_rft.loop import _trainer as trainers
from eval_protocol_rft.loop._run_options import (
    MODEL,
    LoopOptions,
    LoraSettings,
    Optimizer,
    SetupError,
)
from eval_protocol_rft.loop._served_weights import EngineWeights, ServedWeights
from eval_protocol_rft.scoring import parameters_of, sets_of

if TYPE_CHECKING:
    from eval_protocol_rft.local import LocalSampler


class Slots:
    """So many at once in an event loop, over all who share it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._semaphore: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    def semaphore(self) -> asyncio.Semaphore:
        """Of the running loop."""
        loop = asyncio.get_running_loop()
        if self._semaphore is None or self._semaphore[0] is not loop:
            self._semaphore = (loop, asyncio.Semaphore(self.size))
        return self._semaphore[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that depends on where sampling and training happen."""

    trainer: trainers.Trainer
    processor: rollout.FireworksTrainingRolloutProcessor
    request: rollout.RolloutRequest
    params: dict[str, Any]
    """completion_params of training rollouts."""
    sampler: LocalSampler | None = None
    eos_token_ids: Collection[int] = ()
    max_concurrency: int | Slots | None = None
    publish_first: bool = False
    """The sampler may hold other weights than the trainer when a run begins."""
    tokenizer: Any = None
    """A transformers tokenizer, to be saved beside the final weights."""
    engine: Engine | None = None
    """This run's own, to be stopped at its end."""
    rest: Callable[[], Awaitable[None]] | None = None
    """Has the sampler leave the device to the trainer until new weights are published."""
    at_end: Callable[[], None] | None = None
    """Says what stays behind, however the run ends."""


def merged_params(
    evaluator: Callable[..., Any], given: Mapping[str, Any] | None, *, model: str | None = None
) -> dict[str, Any]:
    """completion_params to sample with: the test's own, and what the caller changed.

    Raises:
        SetupError: the test has several sets of completion_params, and none was chosen.
    """
    sets = sets_of(parameters_of(evaluator), "completion_params")
    if len(sets) > 1 and given is None and model is None:
        raise SetupError(
            f"the evaluation test has {len(sets)} sets of completion_params: choose a model, or "
            "pass those to sample with as completion_params="
        )
    params = {**(sets[0] if len(sets) == 1 else {}), **(given or {})}
    return params if model is None else {**params, "model": model}


def sampled_request(params: Mapping[str, Any]) -> rollout.RolloutRequest:
    """What completion_params to train with ask for.

    Raises:
        SetupError: they sample greedily.
        ParamsError: they are wrong.
    """
    request = rollout.parse_completion_params(params)
    if request.params.temperature == 0:
        raise SetupError("completion_params sample greedily (temperature 0): nothing to learn from")
    return request


def rollout_params(
    evaluator: Callable[..., Any],
    given: Mapping[str, Any] | None,
    *,
    model: str | None,
    options: LoopOptions,
) -> dict[str, Any]:
    """completion_params of a run's training rollouts, with n and seed.

    Raises:
        SetupError: as `merged_params` and `sampled_request`; or one completion per prompt, for an
            algorithm that compares several.
        ParamsError: they are wrong.
    """
    params = merged_params(evaluator, given, model=model)
    if options.completions_per_prompt is not None:
        params["n"] = options.completions_per_prompt
    request = sampled_request(params)
    if request.n < 2 and options.batch.relative:
        raise SetupError(
            f"{options.algorithm} compares the completions of a prompt, and completion_params "
            f"ask for n={request.n}: set n, or completions_per_prompt"
        )
    if request.in_process:
        # A seed draws the same tokens here; other servers may not take one.
        params.setdefault("seed", options.seed)
    return params


def own_processor(evaluator: Callable[..., Any]) -> rollout.FireworksTrainingRolloutProcessor:
    """The processor of the evaluation test.

    Raises:
        SetupError: it is none that can be pointed at the policy in training.
    """
    test = parameters_of(evaluator)
    if test is None:
        return rollout.FireworksTrainingRolloutProcessor()
    processor = test.rollout_processor
    if not isinstance(processor, rollout.FireworksTrainingRolloutProcessor):
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

    sampler: Annotated[Literal["local", "vllm"] | None, MODEL(unset="as --model says")] = None
    """What samples a model local/... or vllm/...: this process, or an engine beside it."""
    weights: Annotated[Path | None, MODEL()] = None
    """Folder of the weights that the server serves."""
    lora: LoraSettings | None = None
    """Train adapters instead of all parameters."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    placement: Placement = field(default_factory=Placement)
    """Device and dtype of the model, sampled and trained."""
    processes: Annotated[int, Ge(1), MODEL()] = 1
    """So many on this machine train together, each with a part of weights and optimiser."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    """Of the engine, where vLLM samples."""
    trust_remote_code: Annotated[bool, MODEL()] = False
    """Let the model's folder run its own code."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Told where the model will lie, before it is loaded, and which weights a server is left
    with."""

    def settings(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "weights": None if self.weights is None else str(self.weights),
            "lora": None if self.lora is None else asdict(self.lora),
            "optimizer": self.optimizer.settings(),
            # Another GPU of the same machine draws the same curve.
            "placement": {
                **asdict(self.placement),
                "device": self.placement.device.partition(":")[0],
            },
        }

    async def make(
        self, evaluator: Callable[..., Any], params: dict[str, Any], options: LoopOptions
    ) -> Parts:
        """Load the model and put sampler and trainer together.

        Raises:
            SetupError: weights are missing, or superfluous; or --sampler is not for the model.
            RefusedError: there is no such model, or torch or vLLM is missing; the model takes more
                memory than is free.
            RunStoppedError: vLLM does not start.
        """
        params = self._sampled_by(params)
        request = rollout.parse_completion_params(params)
        if not request.needs_engine:
            return await asyncio.to_thread(self._make, evaluator, params, options, None)
        # Before the trainer's model is loaded: vLLM measures what memory is free.
        engine = await asyncio.to_thread(
            Engine.start,
            request.params.model,
            options=self.vllm,
            placement=self.placement,
            trust_remote_code=self.trust_remote_code,
            takes_weights=True,
            sleeps=options.max_staleness == 0,
        )
        self.say(f"vLLM starts for {engine.name}, its log is {engine.log}")
        try:
            await asyncio.wrap_future(engine.ready)
            return await asyncio.to_thread(self._make, evaluator, params, options, engine)
        except BaseException:
            await asyncio.to_thread(engine.stop)
            raise

    def _sampled_by(self, params: dict[str, Any]) -> dict[str, Any]:
        """completion_params whose model says what `sampler` does."""
        model = str(params.get("model", ""))
        own = next((p for p in (LOCAL_PREFIX, VLLM_PREFIX) if model.startswith(p)), None)
        if self.sampler is None:
            return params
        if own is None:
            raise SetupError(
                f"--sampler {self.sampler} is for a model of this machine, local/... or vllm/...; "
                f"{model!r} is a server's"
            )
        wanted = LOCAL_PREFIX if self.sampler == "local" else VLLM_PREFIX
        return {**params, "model": wanted + model.removeprefix(own)}

    def _make(
        self,
        evaluator: Callable[..., Any],
        params: dict[str, Any],
        options: LoopOptions,
        engine: Engine | None,
    ) -> Parts:
        from eval_protocol_rft.local import LocalSampler
        from eval_protocol_rft.loop._sharded import make_trainer

        processor = own_processor(evaluator)
        params, source = first_weights(
            params, processor, self.weights, hint="(--weights), which are trained here"
        )
        request = rollout.parse_completion_params(params)
        local = request.in_process
        place = self._place(source, request, options)
        loaded = LocalSampler.from_pretrained(
            source,
            placement=place,
            trust_remote_code=self.trust_remote_code,
            policy_version="step-0",
        )
        sink: trainers.WeightSink
        rest = at_end = None
        if engine is not None:
            sink = EngineWeights(engine)
            processor, rest = processor.with_engine(engine), sink.rest
        elif request.endpoint is None:
            sink = trainers.SamplerWeights(loaded)
            processor = processor.sampling_from(loaded)
        else:
            sink = served_weights(request.endpoint)
            at_end = self._tells_of(sink, request.endpoint.place)
        trainer = make_trainer(
            loaded.model,
            source=source,
            processes=self.processes,
            placement=self.placement,
            trust_remote_code=self.trust_remote_code,
            sink=sink,
            temperature=request.params.temperature,
            lora=self.lora,
            optimizer=self.optimizer,
            keep_reference=options.kl_beta > 0,
            in_place=not local,
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
            engine=engine,
            rest=rest,
            at_end=at_end,
        )

    def _place(
        self, source: str, request: rollout.RolloutRequest, options: LoopOptions
    ) -> Placement:
        """Where the model will lie; says so, and that sampler and trainer fit there."""
        from eval_protocol_rft.local import Memory, config_and_place, estimate
        from eval_protocol_rft.loop._memory import LocalRun, long_datum, sampler_memory

        config, place = config_and_place(
            source, self.placement, trust_remote_code=self.trust_remote_code
        )
        sampler = Memory()
        if request.in_process:
            sampler = estimate(lambda: sampler_memory(config, place))
        run = LocalRun(
            config=config,
            place=place,
            lora=self.lora,
            optimizer=self.optimizer,
            sampler=sampler,
            reference=options.kl_beta > 0,
            longest=long_datum(config, request.params.max_tokens),
            datums=options.groups_per_step * request.n,
        )
        # An engine that sleeps while we train holds memory now that is free then.
        sleeps = request.needs_engine and options.max_staleness == 0
        # Each of several processes holds a part, most of them on other devices.
        memory = estimate(run.memory) if sleeps or self.processes > 1 else run.checked()
        self.say(f"{Path(source).name}: {place}{memory}")
        return place

    def _tells_of(self, sink: ServedWeights, place: str) -> Callable[[], None]:
        """Say at the beginning that a server's weights change, and at the end which it has."""
        weights = self.weights
        assert weights is not None  # noqa: S101 - narrows the type: `first_weights` wants them
        self.say(
            f"{place} takes the weights in {weights} now and new ones with every step, and is left "
            "with the newest: whoever else samples from it gets them too"
        )

        def tell() -> None:
            if stays := sink.what_stays(weights):
                self.say(stays)

        return tell


def first_weights(
    params: dict[str, Any],
    processor: rollout.FireworksTrainingRolloutProcessor,
    weights: str | os.PathLike[str] | None,
    *,
    hint: str,
) -> tuple[dict[str, Any], str]:
    """completion_params, and the folder of the weights that training begins with.

    Args:
        params: of training rollouts.
        processor: may name the tokenizer.
        weights: folder of the weights that a server serves.
        hint: how to name that folder and who trains it, for whoever did not.

    Raises:
        SetupError: weights are missing, or superfluous.
        RefusedError: there is no such local model.
    """
    request = rollout.parse_completion_params(params)
    if request.endpoint is None:
        if weights is not None:
            raise SetupError(
                "weights= is for a server's; a model local/... or vllm/... names its own"
            )
        try:
            if request.needs_engine:
                return params, vllm_source(request.params.model)
            return params, str(local_model_folder(request.params.model))
        except NoSuchModelError as error:
            raise sampling.RefusedError(str(error)) from error
    if weights is None:
        raise SetupError(
            f"{request.params.model} is sampled from a server: name the folder of its weights "
            f"{hint} and sent there"
        )
    return with_tokenizer_of(weights, params, processor), str(weights)


def with_tokenizer_of(
    weights: str | os.PathLike[str],
    params: dict[str, Any],
    processor: rollout.FireworksTrainingRolloutProcessor,
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


def with_engine(
    processor: rollout.FireworksTrainingRolloutProcessor, model: str, trust_remote_code: bool
) -> tuple[rollout.FireworksTrainingRolloutProcessor, EngineWeights]:
    """The processor with an engine of its own for `model`, and where its weights go. Blocks until
    it is ready; it is stopped when the process ends."""
    engine = Engine.start(model, trust_remote_code=trust_remote_code, takes_weights=True)
    engine.ready.result()
    return processor.with_engine(engine), EngineWeights(engine)


def served_weights(endpoint: sampling.Endpoint) -> ServedWeights:
    """Where the weights of the server at `endpoint` go."""
    key = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    return ServedWeights(endpoint.base_url, headers={**key, **dict(endpoint.headers)})


_UNBOUNDED = 1 << 20
"""Completions in flight in this process: the sampler's own queue bounds what runs."""
