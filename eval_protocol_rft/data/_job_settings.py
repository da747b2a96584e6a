"""What a job is asked to do, as the metadata of its file says it, and whether two are the same.

Invariant: whatever changes what is sampled is in the metadata, so a job is continued only with the
same data, model and parameters; what does not (concurrency, timeouts, the server's address) is not.
A job may grow, by more rows of its data set or more completions of each: what is there is what it
would have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import FileMetadata
from eval_protocol_rft.data._questions import Questions
from eval_protocol_rft.data.source._columns import SourceColumn
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.local import LoadedTokenizer, models
from eval_protocol_rft.rollout import RolloutRequest, redact_params
from eval_protocol_rft.sampling import support_truncated

_FREE_TO_CHANGE = frozenset(
    {
        "data.name",
        "sampling.seed_given",
        "sampling.split_reasoning",  # follows from `raw`
        "schema_version",
        "package_version",
        "rewards",
    }
)
"""What two jobs may differ in and still be one."""


def job_schema(
    questions: Questions,
    request: RolloutRequest,
    tokenizer: LoadedTokenizer,
    *,
    dtype: str | None,
    seed_given: bool,
    episodes: file_format.EpisodeSettings | None,
) -> pa.Schema:
    """Schema and metadata of the file that the job writes.

    Raises:
        SourceError: a column cannot be stored under its name.
    """
    source, data = questions.source, questions.data
    json_columns = [file_format.ORIGINAL_PREFIX + c.name for c in source.columns if c.is_json]
    if questions.truth.is_json:
        json_columns.append("ground_truth")
    params = request.params
    metadata = FileMetadata(
        prompt_kind=questions.asked_kind,
        sampling=file_format.SamplingSettings(
            model=params.model,
            model_fingerprint=model_fingerprint(params.model),
            dtype=None if dtype == "float32" else dtype,  # as in files from before it was known
            tokenizer=tokenizer.name,
            chat_template_hash=None if request.raw else tokenizer.chat_template_hash,
            raw=request.raw,
            add_special_tokens=request.add_special_tokens,
            split_reasoning=not request.raw,
            chat_template_kwargs=redact_params(request.chat_template_kwargs),
            system=questions.system,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            stop=list(params.stop),
            n=request.n,
            seed=request.seed,
            seed_given=seed_given,
            support_truncated=support_truncated(params),
            other=redact_params(params.extra),
        ),
        data=data,
        episodes=episodes,
        json_columns=json_columns,
    )
    _check_names(source.columns)
    types = {column.name: column.type for column in source.columns}
    return file_format.schema(
        metadata,
        types,
        ground_truth=questions.truth.type,
        episodes=episodes is not None,
    )


def differences(known: FileMetadata, asked: FileMetadata) -> list[str]:
    """What two jobs differ in, as `temperature: 1.0 there, 0.7 asked for`. A seed that nobody gave
    makes no difference."""
    there, here = (_flat(msgspec.to_builtins(metadata)) for metadata in (known, asked))
    free = set(_FREE_TO_CHANGE)
    if not there.get("sampling.seed_given") and not here.get("sampling.seed_given"):
        free.add("sampling.seed")
    return [
        _difference(name, there.get(name), here.get(name))
        for name in dict.fromkeys([*there, *here])
        if name not in free and there.get(name) != here.get(name)
    ]


def _grown(known: FileMetadata, asked: FileMetadata) -> FileMetadata:
    """`known` with as many rows and completions of each as `asked` has, where these are more: the
    rows and completions that are there come first among them."""
    there, here = known.sampling, asked.sampling
    if there is None or here is None or known.data is None or asked.data is None:
        return known
    before, limit = known.data.limit, asked.data.limit
    more_rows = before is not None and (limit is None or limit > before)
    return msgspec.structs.replace(
        known,
        sampling=msgspec.structs.replace(there, n=max(there.n, here.n)),
        data=msgspec.structs.replace(known.data, limit=limit if more_rows else before),
    )


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "episodes.code" and there and here:
        changed = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        return f"the environment is an earlier version of it (changed: {', '.join(changed)})"
    return f"{name.removeprefix('sampling.')}: {there!r} there, {here!r} asked for"


def model_fingerprint(model: str) -> str | None:
    """Tells the weights of a local folder apart; None for a model behind a server or a hub id."""
    folder = models.folder_here(model)  # None too: of a sampler of the caller's, under any name
    return None if folder is None else models.model_folder_fingerprint(folder)


def _check_names(columns: tuple[SourceColumn, ...]) -> None:
    seen = [column.name for column in columns]
    double = {name for name in seen if seen.count(name) > 1}
    if double:
        raise SourceError(f"the data set has two columns called {min(double)!r}: rename one")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if prefix == "" and isinstance(value, Mapping) and key not in _FREE_TO_CHANGE:
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def refuse_foreign_columns(target: Path, known: pa.Schema, asked: pa.Schema) -> None:
    rewards = file_format.metadata_of(known).rewards
    ours = {
        *asked.names,
        *(name for column in rewards for name in file_format.reward_columns(column)),
    }
    foreign = [name for name in known.names if name not in ours]
    if foreign:
        raise JobError(
            f"{target} has columns that this job does not write: {', '.join(foreign)}. Move the "
            "file elsewhere to keep them, or take them out to continue it"
        )


def n_of(schema: pa.Schema | None) -> int:
    """Completions per prompt of a job; 0 where there is none."""
    sampling = None if schema is None else file_format.metadata_of(schema).sampling
    return 0 if sampling is None else sampling.n


def is_same(known: pa.Schema | None, asked: pa.Schema) -> bool:
    """Whether a job is the one that is asked for, or grows to it."""
    if known is None:
        return False
    wanted = file_format.metadata_of(asked)
    return not differences(_grown(file_format.metadata_of(known), wanted), wanted)


def same_job(
    where: Path, known: pa.Schema | None, asked: pa.Schema, *, overwrite: bool
) -> pa.Schema | None:
    """`known` where it is of the job that is asked for, grown to what is asked for."""
    if known is None:
        return None
    wanted = file_format.metadata_of(asked)
    grown = _grown(file_format.metadata_of(known, where=str(where)), wanted)
    differ = differences(grown, wanted)
    if not differ:
        return file_format.with_metadata(known, grown)
    if overwrite:
        return None
    raise JobError(
        f"{where} is of another job. {'; '.join(differ)}. Ask for the same to continue it, choose "
        "another output, or replace it with --overwrite"
    )
