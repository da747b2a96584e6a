"""Scored rows as Eval Protocol's JSONL holds them, small enough to read in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval_protocol_rft.training._types import PromptGroup

PROMPT = [1, 2, 3]


def completion(index: int, tokens: int = 2) -> tuple[list[int], list[float]]:
    """Ids and logprobs that tell completion and position apart."""
    ids = [100 * (index + 1) + t for t in range(tokens)]
    return ids, [-0.25 * (t + 1) for t in range(tokens)]


def record(
    rewards: Sequence[float | None] | None,
    *,
    completions: Sequence[tuple[Any, Any]] | None = None,
    indices: Sequence[int] | None = None,
    prompt: Any = PROMPT,
    truncated: Sequence[int] = (),
    versions: Sequence[str | None] | None = None,
    metrics: Sequence[dict[str, Any]] | None = None,
    failures: int = 0,
    **sampling: Any,
) -> dict[str, Any]:
    """What a rollout leaves in `extra`. `rewards` also says how many completions there are, unless
    `completions` does; `truncated` names places among them."""
    size = len(completions) if completions is not None else len(rewards or ())
    made = completions if completions is not None else [completion(i) for i in range(size)]
    cut = [i in truncated for i in range(size)]
    extra = {
        "rft_schema": 1,
        "prompt_ids": prompt,
        "completion_ids": [ids for ids, _ in made],
        "inference_logprobs": [values for _, values in made],
        "completions_text": ["-"] * size,
        "truncated": cut,
        "finish_reasons": ["length" if is_cut else "stop" for is_cut in cut],
        "failures": [
            {"index": size + i, "kind": "timeout", "message": "-", "attempts": 3, "seconds": 1.0}
            for i in range(failures)
        ],
        "sampling": {
            "model": "m",
            "tokenizer": "tok",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "n": size + failures,
            "indices": list(indices or range(size)),
            "seeds": [None] * size,
            "policy_versions": list(versions or [None] * size),
            "request_ids": [None] * size,
            "attempts": [1] * size,
            "seconds": [1.0] * size,
            **sampling,
        },
    }
    if rewards is not None:
        extra["rewards"] = list(rewards)
    if metrics is not None:
        extra["completion_results"] = [
            {"score": r, "metrics": m} for r, m in zip(rewards or (), metrics, strict=True)
        ]
    return extra


def row(
    row_id: str | None,
    extra: dict[str, Any] | None,
    *,
    experiment: str = "exp",
    run: int = 0,
    result: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "2+2?"}],
        "input_metadata": {"row_id": row_id, "completion_params": {"model": "m", "n": 4}},
        "execution_metadata": {
            "experiment_id": experiment,
            "run_id": f"run-{run}-{row_id}",
            "rollout_id": f"rollout-{run}-{row_id}",
            "extra": None if extra is None else {"run_index": run, "foreign": "key", **extra},
        },
        "rollout_status": {"code": 100, "message": "-", "details": []},
        "evaluation_result": result,
    }


def scored(row_id: str, *rewards: float | None, **kwargs: Any) -> dict[str, Any]:
    """A row of completions with these rewards."""
    return row(row_id, record(rewards, **kwargs))


def failed_row(row_id: str) -> dict[str, Any]:
    made = row(row_id, None)
    made["rollout_status"] = {"code": 13, "message": "no server", "details": []}
    return made


def contents_of(group: PromptGroup) -> list[tuple[Any, ...]]:
    return [
        (t.tokens.tolist(), t.logprobs.tolist(), t.loss_mask.tolist(), t.reward, t.finish_reason)
        for t in group.trajectories
    ]
