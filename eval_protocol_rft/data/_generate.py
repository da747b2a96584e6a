"""`generate`: a data set in, a rollout file out.

Invariant: what was sampled is never lost and never sampled twice. The file appears when every
completion is there, as itself or as a failure; until then they are in `<file>.parts`, and the same
call goes on from there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._options import Flag, check_arguments
from eval_protocol_rft.data import _files as files
from eval_protocol_rft.data._column_roles import PROMPT_COLUMNS
from eval_protocol_rft.data._context import context_length, tell_what_does_not_fit
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._generate_output import Output, OutputJob, find_job
from eval_protocol_rft.data._job_store import parts_folder
from eval_protocol_rft.data._progress import repeating, reporter
from eval_protocol_rft.data._questions import Questions
from eval_protocol_rft.data._sampling_run import NothingToSample, RaySampler, RunCounts, SamplingRun
from eval_protocol_rft.data.source._opening import aopen_source
from eval_protocol_rft.data.source._urls import PathOrGlob
from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.engine import VllmOptions
from eval_protocol_rft.rollout import Backends, parse_completion_params
from eval_protocol_rft.sampling import Prices, RetryPolicy, RunSummary, Sampler
from eval_protocol_rft.scoring.executors import RAY_ADDRESS, Engine, check_engine

if TYPE_CHECKING:
    from eval_protocol_rft.data._generate_episodes import EpisodeJob
    from eval_protocol_rft.episodes import Environment, EpisodeLimits, EpisodeRolloutProcessor


DEFAULT_CONCURRENCY = 96
_DATA = functools.partial(Flag, panel="Data set")
_EPISODES = functools.partial(Flag, panel="Episodes")
_RUN = functools.partial(Flag, panel="Run")
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a call of `generate` did."""

    output: Path
    prompts: int
    total: int
    """Completions asked for, over all runs."""
    failed: int
    """Completions that failed for good, over all runs."""
    may_succeed: int
    """Those of them that another try may bring: what a server refuses for what it is, or a template
    cannot render, will fail again."""
    run: RunCounts
    """Of this call alone."""
    seconds: float
    """From the first request of this call to the last row stored."""
    attempts: RunSummary
    """Of this call's requests: latencies, retries, requests in flight."""


def generate(
    data: PathOrGlob | Sequence[PathOrGlob],
    output: str | os.PathLike[str],
    completion_params: Mapping[str, Any],
    **options: Any,
) -> GenerateSummary:
    """`agenerate` where no event loop is running."""
    return asyncio.run(agenerate(data, output, completion_params, **options))


async def agenerate(
    data: PathOrGlob | Sequence[PathOrGlob],
    output: str | os.PathLike[str],
    completion_params: Mapping[str, Any],
    *,
    prompt_key: Annotated[
        str | None, _DATA(unset=f"the first of {', '.join(PROMPT_COLUMNS)}")
    ] = None,
    ground_truth_key: Annotated[
        str | None,
        _DATA(
            unset="ground_truth; of verl's data reward_model.ground_truth, of GSM8K's answer####"
        ),
    ] = None,
    row_id_key: Annotated[
        str | None, _DATA(unset="row_id, if there is one; else the data's name and a number")
    ] = None,
    system: Annotated[str | None, _DATA()] = None,
    limit: Annotated[int | None, Ge(1), _DATA()] = None,
    shuffle_seed: Annotated[int | None, Ge(0), _DATA()] = None,
    where: Annotated[str | None, _DATA()] = None,
    episodes: Annotated[
        str | Callable[[], Environment] | EpisodeRolloutProcessor | None,
        _EPISODES(metavar="FILE.py::NAME|MODULE:NAME", unset="single completions"),
    ] = None,
    limits: EpisodeLimits | Mapping[str, Any] | None = None,
    on_rewrite: Annotated[
        Literal["split", "reject"] | None, _EPISODES(unset="split, or the processor's")
    ] = None,
    concurrency: Annotated[
        int | None, Ge(1), _RUN(unset="found out as it goes; local models, and episodes: 96")
    ] = None,
    retry: RetryPolicy | None = None,
    retry_failed: Annotated[bool, _RUN()] = False,
    overwrite: Annotated[bool, _RUN()] = False,
    tokenizer: Any = None,
    sampler: Sampler | None = None,
    trust_remote_code: Annotated[bool, _RUN()] = False,
    placement: Placement | None = None,
    engine: Annotated[Engine, _RUN()] = "local",
    ray_address: Annotated[str | None, _RUN(unset=RAY_ADDRESS)] = None,
    vllm: VllmOptions | None = None,
    prices: Prices | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> GenerateSummary:
    """Sample n completions for every row of a data set.

    Args:
        data: a file, a folder, a pattern such as `shards/*.jsonl`, a URL of fsspec, or several of
            them: Parquet, JSONL, JSON, CSV or TSV, text also as .gz, .zst or .bz2, or what
            `datasets` saved; see `open_source`.
        output: `.parquet` or `.jsonl`. Where a job for it was begun, it is continued; with a larger
            `limit` or `n` it grows, and only what is missing is sampled.
        completion_params: as for the processor: `model`, `n` (default: of the job that is there,
            else 1), `temperature`, `max_tokens`, ...
        prompt_key: column of the prompts: text, lists of chat messages, or (prompt_token_ids) ids
            that are sampled from as they are.
        ground_truth_key: column of the ground truth, or a path into its objects such as
            reward_model.ground_truth; with #### at its end, what stands in its text behind that.
        row_id_key: column, or path, of what the rows are called; all different.
        system: system message for prompts that have none.
        limit: at most so many rows.
        shuffle_seed: shuffle the rows, before --limit.
        where: only rows of which this is true, e.g. "level >= 3 and subject == 'algebra'".
        episodes: sample episodes of several turns: a class of environments or a function that
            makes one; or an `EpisodeRolloutProcessor`, or an evaluation test with one, for what
            these say.
        limits: how long an episode may get, in the place of the processor's; a mapping, of those
            that it has.
        on_rewrite: what to do where the chat template renders earlier turns anew: begin a new
            segment, or fail the episode.
        concurrency: requests in flight; episodes, and environments, alive.
        retry: budget of attempts per completion.
        retry_failed: sample failed completions again.
        overwrite: replace an output of other settings. A finished file stays until the new one is
            there; what was begun with the same settings is continued all the same.
        tokenizer, sampler: as for the processor.
        trust_remote_code: let tokenizer and model folders run their own code.
        placement: device and dtype of a `local/...` model, see `local.Placement`.
        engine: with ray, sample on every node of a Ray cluster; they share `concurrency`.
        ray_address: HOST:PORT of the cluster, or auto.
        vllm: options of the engine of a model `vllm/...`.
        prices: of the model, for the cost in `GenerateSummary.attempts`.
        progress: show a bar; None: where stderr is a terminal.
        say: told where a `local/...` model will lie, when it is loaded.

    Raises:
        SourceError: the data set, or a row of it, is wrong; nothing was asked yet.
        ParamsError, TokenizerError, PromptError: settings are; nothing was asked yet.
        JobError: the output could not be written at the end; nothing was asked yet;
            the output is there and of another job.
        BusyError: another process writes to the same output.
        RayEngineError: there is no Ray, no cluster, or a node of it cannot do its work.
        JobError: `episodes` names nothing that makes environments, or the prompts or the engine are
            not for episodes; nothing was asked yet.
        RunStoppedError: the first completions all failed, or nothing answers at the address of
            Fireworks.
        RunStoppedError: the server's logprobs are not what `logprobs_mode` says; nothing was kept.
        OSError: the disk is full or failed. What was stored is safe.
    """
    if episodes is None and (limits or on_rewrite is not None):
        raise JobError("limits and on_rewrite are of episodes: say which (--episodes)")
    if episodes is not None and engine == "ray":
        raise JobError("episodes run in this process: use the local engine")
    check_engine(engine)
    check_arguments(agenerate, locals())
    target = files.output_path(output)
    files.check_rollout_file(target, folders=[parts_folder(target)])
    if engine == "ray" and sampler is not None:
        raise ValueError("a sampler of your own lives in this process: use the local engine")
    request = parse_completion_params(completion_params)
    if request.raw and (episodes is not None or system is not None):
        what = "a system message" if episodes is None else "turns of an episode"
        raise JobError(
            f"raw text has no place for {what}: name a chat template (--chat-template chatml), or "
            "leave --raw out"
        )
    episodes_job: EpisodeJob | None = None
    if episodes is not None:
        from eval_protocol_rft.data._generate_episodes import RowEpisodes, episode_job

        episodes_job = await asyncio.to_thread(episode_job, episodes, limits, on_rewrite)
    source = await aopen_source(data)
    files.check_not_read(target, source.paths)
    questions = await asyncio.to_thread(
        Questions.check,
        source,
        prompt_key=prompt_key,
        ground_truth_key=ground_truth_key,
        row_id_key=row_id_key,
        system=system,
        limit=limit,
        shuffle_seed=shuffle_seed,
        where=where,
    )
    if episodes_job is not None and questions.kind == "ids":
        raise JobError(
            f"{source.name}: the prompts in {questions.data.prompt_key!r} are token ids, and an "
            "episode renders its turns from messages: name a column of text or messages with "
            "--prompt-key"
        )
    if engine == "ray" and request.needs_engine:
        raise JobError(
            f"{request.params.model}: an engine is started on this machine, for this process. For "
            "a cluster serve the model with vLLM there, and name it as that does, with --base-url"
        )
    backends = Backends(
        tokenizer=tokenizer,
        sampler=sampler,
        trust_remote_code=trust_remote_code,
        placement=placement,
        say=say,
        vllm=vllm,
        progress=progress,
    )
    clients: dict[sampling.Endpoint, sampling.HttpSampler] = {}
    remote: RaySampler | None = None
    endpoint = request.endpoint
    if endpoint is not None and endpoint.is_fireworks and sampler is None and engine != "ray":
        # A service is there, or its address is wrong; servers of one's own may still be loading.
        await sampling.reach(endpoint)
    try:
        chosen: Sampler | None = None
        engine_dtype = None
        if request.needs_engine and sampler is None:
            if placement is not None and placement.dtype != "auto":
                engine_dtype = placement.dtype
            # What can be refused is refused before an engine starts.
            own_tokenizer = await backends.tokenizer(request)
        else:
            chosen, own_tokenizer = await backends.resolve(request, clients)
        if episodes_job is None:
            questions.render_first(own_tokenizer, request)
        output_job = find_job(
            target,
            questions,
            request,
            own_tokenizer,
            dtype=getattr(chosen, "dtype", engine_dtype),
            n_given=rollout.flat_params(completion_params).get("n") is not None,
            seed=secrets.randbits(31) if backends.seeds_are_free(request) else None,
            overwrite=overwrite,
            episodes=None if episodes_job is None else episodes_job.settings,
        )
        if chosen is None and output_job.is_finished(retry_failed=retry_failed):
            chosen = NothingToSample()
        elif chosen is None:
            request = await backends.placed(request)
            chosen, _ = await backends.resolve(request, clients)
        asks_server = isinstance(chosen, sampling.HttpSampler) and not chosen.knows_logprobs
        if asks_server and sampling.needs_check(request.params):
            await sampling.check_logprobs_mode(
                chosen,
                [
                    sampling.TokenIds(own_tokenizer.tokenizer.encode(text))
                    for text in sampling.PROBE_TEXTS
                ],
                request.params,
                slots=asyncio.Semaphore(sampling.PROBE_DRAWS),
                retry=retry or RetryPolicy(),
                limiter=sampling.RunLimiter(),
            )
        if engine == "ray":
            remote = RaySampler(
                request,
                trust_remote_code,
                concurrency or DEFAULT_CONCURRENCY,
                ray_address,
                placement,
            )
            await remote.start()
        own = request.endpoint is None or sampler is not None or engine == "ray"
        run_episodes = None
        if episodes_job is not None:
            run_episodes = functools.partial(
                RowEpisodes,
                episodes_job,
                own_tokenizer,
                output_job.request,
                getattr(chosen, "context_length", None),
                asyncio.Semaphore(concurrency or DEFAULT_CONCURRENCY),
                not output_job.is_scored,
            )
        most = concurrency or (DEFAULT_CONCURRENCY if own else None)
        bound: sampling.ConcurrencyLimit = sampling.AdaptiveLimit()
        if most is not None:
            bound = sampling.FixedLimit(most)
        async with sampling.polling(None if own else request.endpoint, bound):
            return await _run(
                output_job,
                functools.partial(
                    SamplingRun,
                    sampler=remote or chosen,
                    tokenizer=own_tokenizer,
                    request=output_job.request,
                    retry=retry or RetryPolicy(),
                    limit=bound,
                    highest=most or sampling.HIGHEST,
                    episodes=run_episodes,
                ),
                retry_failed=retry_failed,
                prices=prices,
                progress=progress,
                context=await context_length(chosen, request),
            )
    finally:
        if remote is not None:
            await remote.aclose()
        for client in clients.values():
            await client.aclose()


async def _run(
    job: OutputJob,
    make_run: Callable[..., SamplingRun],
    *,
    retry_failed: bool,
    prices: Prices | None,
    progress: bool | None,
    context: int | None,
) -> GenerateSummary:
    """Sample what is missing, and finish the file. `context`: the model's, where it is known."""
    counts = RunCounts()
    attempts = RunSummary(prices=prices)
    began = time.perf_counter()
    with job.open() as output:
        total, before = job.total, output.done.done + output.done.failed
        if retry_failed:
            before = output.done.done
        missing = functools.partial(output.done.missing, retry_failed=retry_failed)
        warned = _warn_of_room(output)
        if before < total and job.episodes is None:
            await tell_what_does_not_fit(
                job.questions, missing, job.tokenizer, job.request, context
            )
        opening = _opening(output, total - before) if before < total else ""
        with reporter("generate", total, done=before, show=progress, opening=opening) as bar:

            def tell() -> None:
                done = before + counts.completions + counts.failed
                bar.update(done, detail=counts.line(attempts, time.perf_counter() - began))

            def stored(rows: list[CompletionRow]) -> None:
                nonlocal warned
                counts.add(rows)
                warned = warned or _warn_of_room(output)
                tell()

            if before < total and job.episodes is None:
                output.warn_of_other_prompts()
            prompts = job.questions.prompts(
                missing,
                job.tokenizer,
                job.request,
                name=job.data_name,
                rendered=job.episodes is None,
                context=context,
            )
            run = make_run(
                store=output.store,
                on_stored=stored,
                observe=sampling.observers(attempts.add),
                fresh=not output.done.done,
            )
            async with repeating(tell):
                await run.run(prompts)
        if run.doubt is not None:
            logger.warning("%s", run.doubt)
        seconds = time.perf_counter() - began
        reasons = await _to_its_end(output.finish)
    return GenerateSummary(
        output=job.target,
        prompts=job.questions.count,
        total=total,
        failed=reasons.total(),
        may_succeed=sum(count for reason, count in reasons.items() if _may_succeed(*reason)),
        run=counts,
        seconds=seconds,
        attempts=attempts,
    )


def _warn_of_room(output: Output) -> bool:
    """Say where the disk will be full before the job is done, and whether that was said: what a
    completion takes is known from the first packed batch on, of this run or of an earlier one."""
    job = output.job
    warning = None
    if job.base is None:
        warning = files.room_warning(job.target, job.total, *output.store.packed)
    if warning is not None:
        logger.warning(warning)
    return warning is not None


def _opening(output: Output, missing: int) -> str:
    """What the run is about to do, and where it keeps what it has."""
    job = output.job
    server = job.request.endpoint
    params, n = job.request.params, job.request.n
    there = job.total - missing
    return (
        f"{missing:,} completions to sample: {job.questions.count:,} prompts x {n}"
        f"{f', of which {there:,} are there' if there else ''}; from {params.model}"
        f"{f' at {server.place}' if server else ''}. Until all are there they lie in "
        f"{output.store.folder}, and the same command goes on after any stop"
        f"{_raw_prompts(job) if job.request.raw else ''}"
    )


def _raw_prompts(job: OutputJob) -> str:
    """What stands around raw text."""
    plain, whole = (
        job.tokenizer.encode_raw("a", add_special_tokens=added)
        for added in (False, job.request.add_special_tokens)
    )
    if plain == whole:
        return ". Prompts are raw text, with no special tokens around it"
    return f". Prompts are raw text, tokenized as in {job.tokenizer.decode(whole)!r}"


def _may_succeed(kind: str | None, status: int | None) -> bool:
    return kind != "prompt" and (kind != "refused" or status in sampling.ACCOUNT_STATUSES)


async def _to_its_end(work: Callable[[], T]) -> T:
    """Run `work` in a thread. Cancelled, wait for it all the same: our caller closes the store
    that it works on."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
