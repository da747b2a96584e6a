"""`ep-rft convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from eval_protocol_rft import data
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import say
from eval_protocol_rft.cli._flags import Takes


def convert(
    source: Annotated[Path, Flag(metavar="IN")],
    target: Annotated[Path, Flag(metavar="OUT")],
    options: Annotated[dict[str, Any], Takes(data.convert)],
) -> None:
    """Convert rollouts: our Parquet or JSON lines, rows of Eval Protocol, files for verl and TRL.

    What OUT has no place for is listed. Text is never made into tokens: files of verl and TRL can
    be converted back only where `ep-rft convert` wrote them as Parquet.

    Args:
        source: File to convert.
        target: File to write: .parquet, .jsonl or .json.

    Examples:
      ep-rft convert rollouts.parquet rollouts.jsonl
      ep-rft convert rollouts.parquet rows.jsonl --to ep
      ep-rft convert results/run.jsonl rollouts.parquet --drop-failed-rows
      ep-rft convert rollouts.parquet train.parquet --to verl --data-source openai/gsm8k
      ep-rft convert rollouts.parquet sft.parquet --to trl
    """
    say(data.convert(source, target, **options))
