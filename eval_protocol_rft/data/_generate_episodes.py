"""`generate --episodes`: what the policy talks with, and the episodes of one data row.

Invariant: an episode is what `EpisodeRolloutProcessor` would make of the same row: the environment
is shown the row, turns have seeds of their own, and all episodes of a data row answer one prompt.
What the option names was found to make environments before anything is asked.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from eval_protocol.models import EvaluationRow

from eval_protocol_rft import episodes
from eval_protocol_rft.data._episodes import as_arrays, as_read
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow, EpisodeSettings
from eval_protocol_rft.data._sampling_run import Ask, Fill
from eval_protocol_rft.data._to_ep import asked_row
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import RolloutRequest
from eval_protocol_rft.sampling import Failure, SamplingParams, Survivor, TokenIds
from eval_protocol_rft.scoring import executors, parameters_of

Factory = Callable[[], episodes.Environment]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeJob:
    """What the episodes of a job are like. Made by `episode_job`."""

    environment: Factory
    limits: episodes.EpisodeLimits
    on_rewrite: episodes.OnRewrite
    score: episodes.AliveScorer | None
    """The processor's."""
    settings: EpisodeSettings
    """What the file says of it."""


def episode_job(
    named: str | Factory | episodes.EpisodeRolloutProcessor,
    limits: episodes.EpisodeLimits | Mapping[str, Any] | None,
    on_rewrite: episodes.OnRewrite | None,
) -> EpisodeJob:
    """What an option names: a class of environments or a function of nothing that makes one, or an
    `EpisodeRolloutProcessor` or an evaluation test that has one.

    Args:
        named: the thing itself, or `path/to/file.py::name` or `package.module:name`.
        limits: in the place of the processor's; a mapping, of those that it has.
        on_rewrite: in the place of the processor's.

    Raises:
        JobError: it names nothing, or nothing that makes environments.
    """
    try:
        value: Any = executors.load_named(named, "environment") if isinstance(named, str) else named
    except executors.EvaluatorNotFoundError as error:
        raise JobError(str(error)) from error
    name = named if isinstance(named, str) else _name_of(value)
    mcp_config_path = None
    test = parameters_of(value)
    if test is not None:
        value, mcp_config_path = test.rollout_processor, test.mcp_config_path
        if not isinstance(value, episodes.EpisodeRolloutProcessor):
            raise JobError(
                f"{name}: the evaluation test's rollout_processor is a {type(value).__name__}, and "
                "episodes are those of an EpisodeRolloutProcessor"
            )
    own_limits, own_rewrite, factory = episodes.EpisodeLimits(), "split", value
    score: episodes.AliveScorer | None = None
    if isinstance(value, episodes.EpisodeRolloutProcessor):
        score = value.score
        own_limits, own_rewrite, factory = value.limits, value.on_rewrite, value.environment
        if factory is None and not mcp_config_path:
            raise JobError(f"{name}: the processor has no environment: name {_MAKERS}")
        if not value.split_reasoning:
            raise JobError(f"{name}: split_reasoning=False is not for a rollout file")
    if factory is not None:
        _check_factory(factory, name)
    code = _code_of(factory, score)
    if mcp_config_path:
        code["mcp_config_path"] = _file_fingerprint(mcp_config_path)
        factory = episodes.with_mcp(factory, mcp_config_path)
    if isinstance(limits, Mapping):
        limits = replace(own_limits, **limits)
    limits = limits or own_limits
    rewrite: episodes.OnRewrite = on_rewrite or own_rewrite  # type: ignore[assignment]
    return EpisodeJob(
        environment=factory,
        limits=limits,
        on_rewrite=rewrite,
        score=score,
        settings=EpisodeSettings(
            environment=name,
            code=code,
            limits=asdict(limits),
            on_rewrite=rewrite,
        ),
    )


def _check_factory(factory: Any, name: str) -> None:
    if isinstance(factory, episodes.Environment):
        raise JobError(
            f"{name} is one {type(factory).__name__}, and each episode needs its own: name the "
            "class, or a function that makes one"
        )
    if not callable(factory):
        kind = type(factory).__name__
        raise JobError(f"{name} is of type {kind}, and makes no environments: name {_MAKERS}")
    if inspect.isclass(factory) and not callable(getattr(factory, "step", None)):
        raise JobError(f"{name} is a class without step(), so no environment: name {_MAKERS}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise JobError(
            f"{name} needs arguments ({error}), and episodes give none: name {_MAKERS}"
        ) from error
    except ValueError:  # it has no signature that Python knows
        pass


_MAKERS = "a class of environments, or a function of nothing that makes one"


def _name_of(value: Any) -> str:
    if isinstance(value, episodes.EpisodeRolloutProcessor):
        value = value.environment
    value = _plain(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', None) or '?'}:{name}"


def _code_of(factory: Any, score: episodes.AliveScorer | None) -> dict[str, str]:
    plain = _plain(factory)
    code = executors.code_fingerprints(plain) if hasattr(plain, "__qualname__") else {}
    if score is not None:
        scores = executors.code_fingerprints(score.function)
        code |= {f"{name} (score)": fingerprint for name, fingerprint in scores.items()}
    return code


def _file_fingerprint(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise JobError(f"the evaluation test's mcp_config_path cannot be read: {error}") from error


def _plain(factory: Any) -> Any:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


class RowEpisodes:
    """The episodes of one data row.

    Args:
        job, tokenizer, request: what all episodes of a run have in common.
        context_length: the model's, where the sampler knows it.
        slots: so many episodes, and environments, of a run are alive at once.
        keeps_scores: an episode's score while its environment was alive is its reward.
        row: what the episodes of the data row have in common.
    """

    def __init__(
        self,
        job: EpisodeJob,
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
        context_length: int | None,
        slots: asyncio.Semaphore,
        keeps_scores: bool,
        row: CompletionRow,
    ) -> None:
        asked = EvaluationRow.model_validate(asked_row(row))
        self._row_id = asked.input_metadata.row_id
        self._slots, self._keeps_scores = slots, keeps_scores
        self._episodes = episodes.Episodes(
            asked,
            asked.messages,
            tokenizer,
            request.chat_template_kwargs,
            environment=job.environment,
            params=request.params,
            limits=job.limits,
            on_rewrite=job.on_rewrite,
            context_length=context_length,
            score=job.score,
            group_seed=episodes.group_seed(request.seed, str(row.data_idx)),
        )
        self._first: tuple[int, TokenIds] | None = None
        """Place and prompt of the first episode that began."""

    async def __call__(self, row: CompletionRow, ask: Ask, fill: Fill) -> None:
        """Run the episode of a row, and put it there, or why there is none."""
        outcome = await self._run(row.sample_idx, row.seed, ask)
        if isinstance(outcome, Failure):
            fill(row, outcome, TokenIds(()))
        else:
            fill(row, outcome.first, outcome.first_prompt)
            _put_episode(row, outcome)
            score = episodes.alive_score(outcome.record)
            if score is not None and self._keeps_scores:
                row.scores = {"reward": score}

    async def _run(self, index: int, seed: int | None, ask: Ask) -> episodes.Episode | Failure:
        """Run one, from before its environment is made until that is closed."""
        session = hashlib.blake2b(f"{self._row_id}\0{seed}\0{index}".encode(), digest_size=8)

        async def sample(
            turn: int,
            prompt: TokenIds,
            params: SamplingParams,
            turn_seed: int | None,
            on_start: Callable[[], None],
        ) -> Survivor | Failure:
            if not turn and (problem := self._other_prompt(index, prompt)) is not None:
                return problem
            return await ask(prompt, params, turn_seed, on_start)

        async with self._slots:
            return await self._episodes.run(
                index, seed=seed, session=session.hexdigest(), sample=sample
            )

    def _other_prompt(self, index: int, prompt: TokenIds) -> Failure | None:
        """Completions of a data row are compared, so they must answer one prompt."""
        first, known = self._first = self._first or (index, prompt)
        if known == prompt:
            return None
        message = (
            f"reset() said something else in episode {first}; what differs between episodes of a "
            "row must come after the first turn"
        )
        return Failure(index=index, kind="prompt", message=message, attempts=0, seconds=0.0)


def _put_episode(row: CompletionRow, episode: episodes.Episode) -> None:
    """Let a row that has the first turn be the whole episode."""
    row.prompt_ids = np.array(episode.first_prompt, np.int32)
    row.tools = None if episode.tools is None else [dict(tool) for tool in episode.tools]
    row.message = None  # the conversation has it
    row.segments = as_arrays(episode.segments)
    row.episode = as_read(episode.record)
    row.first_finish_reason = row.finish_reason
    row.finish_reason = episode.record.last_finish_reason
    row.truncated = row.finish_reason == "length"
