"""Rollouts for conversions: strategies for whole files, and rows as Eval Protocol has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import (
    CompletionRow,
    DataSettings,
    FileMetadata,
    RewardSettings,
    SamplingSettings,
    schema,
)
from eval_protocol_rft.record import UNSCORED, Score

SAMPLING = SamplingSettings(
    model="m", tokenizer="tok", temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, n=4, seed=3
)
REWARD_B = RewardSettings(evaluator="b.py", fingerprint="ab")

text = st.text(st.characters(codec="utf-8"), max_size=8)
words = st.text("abc <think></think>\n", max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | text
scalars |= st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2)
)
floats = st.floats(-1e3, 1e3, allow_subnormal=False)
logprob = st.floats(-50, 0, width=32)
prompt_ids = st.lists(st.integers(0, 99), min_size=1, max_size=3)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {"role": "assistant", "content": "b", "reasoning_content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PROMPTS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "q"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "q", "name": "u"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>prefill"}],
]


METADATA = FileMetadata(
    prompt_kind="messages",
    sampling=SAMPLING,
    data=DataSettings(name="openai/gsm8k", fingerprint="f", num_rows=2, prompt_key="q"),
    rewards={"reward_b": REWARD_B},
)


def completion(
    data_idx: int, sample_idx: int, reward: float | None = None, **fields: Any
) -> CompletionRow:
    values: dict[str, Any] = {
        "row_id": f"r{data_idx}", "data_idx": data_idx, "sample_idx": sample_idx,
        "prompt": PROMPTS[0], "ground_truth": str(data_idx),
        "response": f"{data_idx}.{sample_idx}", "prompt_ids": np.array([1, 2], np.int32),
        "completion_ids": np.array([10 + sample_idx, 5], np.int32),
        "logprobs": np.array([-0.5, -sample_idx], np.float32), "finish_reason": "stop",
        "truncated": False, "temperature": 0.7, "top_p": 1.0, "top_k": 0,
        "scores": {} if reward is None else {"reward": Score(reward=reward)},
    }  # fmt: skip
    return CompletionRow(**(values | fields))


def failure(data_idx: int, sample_idx: int) -> CompletionRow:
    nothing = dict.fromkeys(
        ("response", "completion_ids", "logprobs", "finish_reason", "truncated")
    )
    return completion(data_idx, sample_idx, error="late", error_kind="timeout", **nothing)


def rollouts(
    path: Path, *rows: CompletionRow, metadata: FileMetadata = METADATA, **types: pa.DataType
) -> Path:
    write_rows(path, schema(metadata, types), rows)
    return path


def loaded(path: Path) -> list[dict[str, Any]]:
    """As `datasets` loads it, which both trainers use."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    found = datasets.load_dataset(
        kind, data_files=str(path), cache_dir=str(path.parent / "cache"), split="train"
    )
    return [dict(row) for row in found]


def same(a: CompletionRow, b: CompletionRow) -> bool:
    """Equal value by value, arrays with their types, 1 and 1.0 apart."""
    return _frozen(a) == _frozen(b)


def _frozen(row: CompletionRow) -> bytes:
    values = {name: getattr(row, name) for name in CompletionRow.__struct_fields__}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            values[name] = [str(value.dtype), *value.tolist()]
    return msgspec.json.encode(values, order="deterministic")


def through_json(row: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(row))
    return values


def in_float32(values: Any) -> Any:
    if isinstance(values, list):
        return [in_float32(value) for value in values]
    return float(np.float32(values)) if isinstance(values, float) else values


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is with logprobs of float32, without what only the file wants to know."""
    row = through_json(row)
    extra = row["execution_metadata"]["extra"]
    extra.pop("rollout_file", None)
    for key in ("inference_logprobs", "raw_logprobs"):
        if key in extra:
            extra[key] = in_float32(extra[key])
    for trace in extra.get("token_turn_traces", []):
        trace["completion_logprobs"] = in_float32(trace["completion_logprobs"])
    return row


@st.composite
def scores(draw: st.DrawFn) -> Score:
    metrics = st.none() | st.dictionaries(text, json_values, min_size=1, max_size=2)
    return Score(
        reward=draw(st.none() | floats),
        reason=draw(st.none() | text),
        metrics=draw(metrics),
        error=draw(st.none() | text),
    )


@st.composite
def completions(draw: st.DrawFn, *, failed: bool, shared: dict[str, Any]) -> CompletionRow:
    maybe = draw(st.booleans())
    common = {
        **shared,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 9 if maybe else None,
        "seed": draw(st.none() | st.integers(0, 2**63 - 1)),
        "attempts": draw(st.none() | st.integers(0, 3)),
        "seconds": draw(st.none() | st.floats(0, 9)),
        "began_at": draw(st.none() | st.floats(1, 2e9)),
    }
    if failed:
        if maybe:
            common["prompt_ids"] = None
        return CompletionRow(
            **common,
            error=draw(text),
            error_kind=draw(st.sampled_from(["timeout", "prompt", "odd"]) | st.none()),
            error_status=draw(st.none() | st.integers(400, 599)),
        )
    size = draw(st.integers(1, 4))
    arrays = [draw(st.lists(logprob, min_size=size, max_size=size)) for _ in range(2)]
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size))
    said = {"reward": draw(scores()), "reward_b": draw(scores())}
    truncated = draw(st.booleans())
    return CompletionRow(
        **common,
        response=draw(words),
        message=draw(st.none() | st.sampled_from([CALLING, THINKING])),
        completion_ids=np.array(ids, np.int32),
        logprobs=np.array(arrays[0], np.float32),
        raw_logprobs=np.array(arrays[1], np.float32) if maybe else None,
        finish_reason="length" if truncated else "stop",
        truncated=truncated,
        policy_version=draw(st.none() | text),
        first_policy_version=draw(st.none() | text),
        request_id=draw(st.none() | text),
        scores={name: score for name, score in said.items() if score != UNSCORED},
    )


COLUMNS = {
    "level": (pa.int64(), st.none() | st.integers(-(2**63), 2**63 - 1)),
    "name": (pa.string(), st.none() | text),
    "share": (pa.float64(), st.none() | floats),
    "any": (pa.string(), json_values),
}


@st.composite
def groups(draw: st.DrawFn, data_idx: int, kind: str, truth: Any) -> list[CompletionRow]:
    original = {name: draw(values) for name, (_, values) in COLUMNS.items()}
    shared = {
        "row_id": draw(st.sampled_from(["r", f"r{data_idx}"])),
        "data_idx": data_idx,
        "prompt": draw(text) if kind == "text" else draw(st.sampled_from(PROMPTS)),
        "tools": draw(st.sampled_from([None, [], [TOOL]])),
        "ground_truth": draw(truth),
        "original": original,
        "prompt_ids": np.array(
            draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)), np.int32
        ),
    }
    fates = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    return [
        draw(completions(failed=failed, shared={**shared, "sample_idx": 2 * i}))
        for i, failed in enumerate(fates)
    ]


@st.composite
def files(draw: st.DrawFn) -> tuple[pa.Schema, list[CompletionRow]]:
    """Schema and rows of a file as `generate`, `score` and `filter` leave it."""
    kind = draw(st.sampled_from(["text", "messages"]))
    is_json = draw(st.booleans())
    metadata = FileMetadata(
        prompt_kind=kind,
        sampling=SAMPLING,
        data=DataSettings(name="d", fingerprint="f", num_rows=9, prompt_key="q"),
        json_columns=["original_any", *(["ground_truth"] if is_json else [])],
        rewards={"reward_b": REWARD_B},
    )
    numbers = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3, unique=True))
    truth = json_values if is_json else st.none() | text
    rows = [row for number in sorted(numbers) for row in draw(groups(number, kind, truth))]
    types = {name: kind for name, (kind, _) in COLUMNS.items()}
    return schema(metadata, types), rows


@st.composite
def evaluated(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """A row as Eval Protocol dumps it after a rollout of ours: built by its own models."""
    from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status

    from eval_protocol_rft.rollout._answers import assistant_message

    size, num_failed = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    split = draw(st.booleans())
    texts = [draw(words) for _ in range(size)]
    extra = draw(records(texts, num_failed, split))
    asked = [Message.model_validate(message) for message in draw(st.sampled_from(PROMPTS))]
    row = EvaluationRow(
        messages=[*asked, assistant_message(texts[0], split_reasoning=split)],
        tools=draw(st.sampled_from([None, [TOOL]])),
        ground_truth=draw(json_values),
        rollout_status=Status.rollout_finished(),
    )
    row.input_metadata.row_id = draw(st.sampled_from(["r", f"r{number}", None]))
    row.input_metadata.completion_params = {"model": "m", "n": size}
    row.input_metadata.dataset_info = draw(st.none() | st.just({"level": 3, "foreign": [1, None]}))
    row.execution_metadata.run_id = f"run-{number}"
    row.execution_metadata.finish_reason = extra["finish_reasons"][0]
    row.execution_metadata.extra = {"run_index": number, "foreign": draw(json_values), **extra}
    if draw(st.booleans()):
        row.evaluation_result = EvaluateResult(score=0.5, reason="why")
    dumped: dict[str, Any] = msgspec.json.decode(
        row.model_dump_json(exclude_none=draw(st.booleans()))
    )
    return dumped


@st.composite
def records(draw: st.DrawFn, texts: list[str], num_failed: int, split: bool) -> dict[str, Any]:
    from tests.scored_rows import record_of

    size = len(texts)
    reasons = draw(st.lists(st.sampled_from(["stop", "length"]), min_size=size, max_size=size))
    made = record_of(texts, finish_reasons=reasons, split_reasoning=split, num_failed=num_failed)
    extra = made.to_extra()
    precise = st.floats(-50, 0)
    for i in range(size):
        extra["inference_logprobs"][i] = [draw(precise), draw(precise)]
    extra["token_turn_traces"][0]["completion_logprobs"] = extra["inference_logprobs"][0]
    extra["sampling"]["began_at"] = draw(st.sampled_from([0.0, 12.5]))
    extra["sampling"]["other"] = draw(st.sampled_from([{}, {"min_p": 0.0}]))
    if draw(st.booleans()):
        del extra["failures"], extra["token_turn_traces"]
    if draw(st.booleans()):
        extra["raw_logprobs"] = [draw(st.none() | st.just([-1.0, -2.5])) for _ in texts]
    how = draw(st.sampled_from(["unscored", "rewards", "results"]))
    if how != "unscored":
        extra["rewards"] = [draw(st.none() | floats) for _ in texts]
    if how == "results":
        extra["completion_results"] = [
            {"score": reward, "reason": draw(st.none() | text), "metrics": {}, "error": None}
            for reward in extra["rewards"]
        ]
    return extra
