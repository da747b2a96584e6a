"""Rows of text for fine-tuning steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def sums_row(a: int, b: int, wrong: Sequence[int] = (0, 0, 1, 2)) -> dict[str, Any]:
    """A prompt group: an answer for each of `wrong`, off by so much, scored 1 where it is right."""
    return {
        "samples": [
            {
                "messages": [
                    {"role": "user", "content": f"{a}+{b}="},
                    {"role": "assistant", "content": str(a + b + off)},
                ],
                "evals": {"score": float(off == 0)},
            }
            for off in wrong
        ]
    }


def sums_rows(count: int) -> list[dict[str, Any]]:
    return [sums_row(10 + i, 20 + 3 * i) for i in range(count)]


def to_jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    """Without a line break at the end, as the older client sends it."""
    return "\n".join(json.dumps(row) for row in rows).encode()
