"""What one bulk job was asked to do, and whether a file or a folder is of the same job.

Invariant: whatever changes what is sampled is in the metadata, so a job is continued only with the
same data, model and parameters. What does not (concurrency, timeouts, the server's address) is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.generation.questions import Questions
from eval_protocol_rft.batch.rollouts.format import (
    ORIGINAL_PREFIX,
    DataSettings,
    FileMetadata,
    SamplingSettings,
    schema,
)
from eval_protocol_rft.batch.source.opening import SourceColumn, SourceError
from eval_protocol_rft.models import (
    LOCAL_PREFIX,
    NoSuchModelError,
    local_model_folder,
    model_folder_fingerprint,
)
from eval_protocol_rft.params import RolloutRequest
from eval_protocol_rft.redaction import redact_params
from eval_protocol_rft.sampling.distribution import support_truncated
from eval_protocol_rft.tokenizer import LoadedTokenizer

_FREE_TO_CHANGE = frozenset({"data.name", "sampling.seed_given", "package_version", "rewards"})
"""What two jobs may differ in and still be one."""


def job_schema(
    questions: Questions, request: RolloutRequest, tokenizer: LoadedTokenizer, *, seed_given: bool
) -> pa.Schema:
    """Schema and metadata of the file that the job writes.

    Raises:
        SourceError: a column cannot be stored under its name.
    """
    source, selection = questions.source, questions.selection
    columns = {column.name: column for column in source.columns}
    truth = columns.get(selection.ground_truth_key or "")
    json_columns = [ORIGINAL_PREFIX + c.name for c in source.columns if c.is_json]
    if truth is not None and truth.is_json:
        json_columns.append("ground_truth")
    params = request.params
    metadata = FileMetadata(
        prompt_kind=questions.asked_kind,
        sampling=SamplingSettings(
            model=params.model,
            model_fingerprint=model_fingerprint(params.model),
            tokenizer=tokenizer.name,
            chat_template_hash=tokenizer.chat_template_hash,
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
        data=DataSettings(
            name=source.name,
            fingerprint=source.fingerprint,
            num_rows=source.num_rows,
            **dataclasses.asdict(selection),
        ),
        json_columns=json_columns,
    )
    _check_names(source.columns)
    types = {column.name: column.type for column in source.columns}
    return schema(metadata, types, ground_truth=None if truth is None else truth.type)


def differences(known: FileMetadata, asked: FileMetadata) -> list[str]:
    """What two jobs differ in, as `temperature: 1.0 there, 0.7 asked for`. A seed that nobody gave
    makes no difference."""
    there, here = (_flat(msgspec.to_builtins(metadata)) for metadata in (known, asked))
    free = set(_FREE_TO_CHANGE)
    if not there.get("sampling.seed_given") and not here.get("sampling.seed_given"):
        free.add("sampling.seed")
    return [
        f"{name.removeprefix('sampling.')}: {there.get(name)!r} there, {here.get(name)!r} asked for"
        for name in dict.fromkeys([*there, *here])
        if name not in free and there.get(name) != here.get(name)
    ]


def model_fingerprint(model: str) -> str | None:
    """Tells the weights of a local folder apart; None for a model behind a server or a hub id."""
    if not model.startswith(LOCAL_PREFIX):
        return None
    try:
        return model_folder_fingerprint(local_model_folder(model))
    except NoSuchModelError:  # of a sampler of the caller's, under any name
        return None


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
