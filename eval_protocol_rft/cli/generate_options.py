"""Options of `ep-rft generate` that need more than typer to be read.

Invariant: one that is wrong ends the command before anything heavy is imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.cli.failing import fail

if TYPE_CHECKING:
    from eval_protocol_rft.sampling.run_summary import Prices


def api_key(name: str | None) -> str | None:
    """The key in the environment variable `name`."""
    if name is None:
        return None
    if not os.environ.get(name):
        fail(f"--api-key-env {name}: there is no such environment variable")
    return os.environ[name]


def json_object(option: str, text: str | None) -> Any:
    """What `option` holds as JSON; None where it was not given."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        fail(f"{option}: not JSON: {error}")
    if not isinstance(value, dict):
        fail(f"{option}: must be a JSON object, got {text}")
    return value


def check_format(output: Path, wanted: str | None) -> None:
    """See that `--format` and the output's name agree."""
    suffixes = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson")}
    if wanted is not None and wanted not in suffixes:
        fail(f"--format must be parquet or jsonl, got {wanted!r}")
    if wanted is not None and output.suffix not in suffixes[wanted]:
        fail(f"--format {wanted} and the output's name {output.name!r} contradict each other")


def prices(price_in: float | None, price_out: float | None) -> Prices | None:
    """What `--price-in` and `--price-out` say, dollars per million tokens."""
    if price_in is None and price_out is None:
        return None
    if price_in is None or price_out is None:
        fail("--price-in and --price-out go together: half of a cost would pass for all of it")

    from eval_protocol_rft.sampling.run_summary import Prices

    try:
        return Prices(prompt=price_in, completion=price_out)
    except ValueError as error:
        fail(str(error))
