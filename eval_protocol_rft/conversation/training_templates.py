"""Chat templates that rewrite history, and those made for training that take their place.

A table of names, by hash: a template that is not in it is unknown, not bad. Each entry was seen to
rewrite in `template_report`, and its replacement to rewrite in fewer cases or in none.
"""

from __future__ import annotations

_QWEN3 = "qwen3_training.jinja"
_KNOWN = {
    "a55ee1b1660128b7": _QWEN3,
    "87a2728cb8dc9fe4": _QWEN3,  # an earlier wording of the same template
    "273d8e0e683b8850": "qwen3_5_nothink_training.jinja",
    "a4aee8afcf2e0711": "qwen3_5_think_training.jinja",
    "e84f32a23fdda276": "qwen3_6_training.jinja",
    "56a1447ad31926fd": "deepseek_r1_distill_training.jinja",
}
"""`LoadedTokenizer.chat_template_hash`, and a file in `trl/chat_templates` (trl 1.16)."""


def training_template(chat_template_hash: str | None) -> str | None:
    """Where a template is that does the same and keeps history, or None where none is known."""
    name = _KNOWN.get(chat_template_hash or "")
    return f"trl/chat_templates/{name}, in the package trl" if name else None
