"""Rollout files into what others read, and back.

    from eval_protocol_rft.batch.conversion import convert

    print(convert("rollouts.parquet", "rows.jsonl", to_format="ep"))

Invariant: nothing is lost in silence. What the target has no place for is in the summary's notes,
or the conversion is refused; text is never made into tokens.
"""

from eval_protocol_rft.batch.conversion.job import convert
from eval_protocol_rft.batch.conversion.types import ConvertError, ConvertSummary

__all__ = ["ConvertError", "ConvertSummary", "convert"]
