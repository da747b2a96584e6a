"""Chat templates of small and known behaviour, and a tokenizer that merges.

Each template says here when it rewrites history; the tests count by that, not by what the code
under test finds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.models import bundled_model_path

START, END = "<|im_start|>", "<|im_end|>"

_TURNS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ BODY }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

_CALLS = (
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
)

APPENDS = "{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}" + _TURNS.replace(
    "{{ BODY }}", _CALLS
)
"""Rewrites only the spelling of arguments, which are fields here."""

STRIPS_THINKING = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}\
{% endif %}{% endfor -%}
""" + _TURNS.replace(
    "{{ BODY }}",
    "{% if message.role == 'assistant' and loop.index0 < ns.last %}"
    "{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}",
)
"""Thinking before the last question is dropped, as Qwen3 does."""

MOVES_SYSTEM = """\
{%- set ns = namespace(said=[]) -%}
{%- for message in messages %}{% if message.role == 'system' %}\
{% set ns.said = ns.said + [message.content] %}{% endif %}{% endfor -%}
<|im_start|>system
{{ ns.said | join(' ') or 'be kind' }}<|im_end|>
{% for message in messages if message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
"""Whatever the system says stands at the top."""

TRIMS = _TURNS.replace("{{ BODY }}", "{{ message.content | trim }}")
"""Blanks around what was said go, as Llama does."""

_WORDS = ("to", "ta", "la", "al", "th", "in", "er", "20", "12", "</", "think", " a", "  ", "\n\n")


def merging_tokenizer(template: str, *, ender_eats_blanks: bool = False) -> LoadedTokenizer:
    """Byte-level BPE with some merges, so that most texts have several spellings in ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for word in _WORDS:
        ((spelled, _),) = byte_level.pre_tokenize_str(word)
        for cut in range(1, len(spelled)):
            merge = (spelled[:cut], spelled[cut])
            vocabulary.setdefault("".join(merge), len(vocabulary))
            if merge not in merges:
                merges.append(merge)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(START, special=True),
            AddedToken(END, special=True, rstrip=ender_eats_blanks),
            AddedToken("<|endoftext|>", special=True),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.chat_template = template
    return LoadedTokenizer.wrap(tokenizer, "merging")


def bundled() -> LoadedTokenizer:
    """The bundled model's own tokenizer and ChatML template."""
    folder = bundled_model_path("arithmetic")
    return LoadedTokenizer.wrap(AutoTokenizer.from_pretrained(folder), "arithmetic")


def real(name: str) -> LoadedTokenizer | None:
    """A real model's tokenizer, where `EP_RFT_TOKENIZERS` has it."""
    folder = Path(os.environ.get("EP_RFT_TOKENIZERS") or "/nowhere", name)
    if not (folder / "tokenizer.json").is_file():
        return None
    return LoadedTokenizer.wrap(AutoTokenizer.from_pretrained(folder), name)


def ids_of(tokenizer: LoadedTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])


def whole(
    tokenizer: LoadedTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Any = None,
    **kwargs: Any,
) -> list[int]:
    """Ids of the conversation as transformers renders and reads all of it."""
    return tokenizer.tokenizer.apply_chat_template(
        list(messages), tools=tools, add_generation_prompt=True, return_dict=False, **kwargs
    )
