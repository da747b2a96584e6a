"""The flags of `generate_rollouts.py`, a script that forks of verl have, as those of
`ep-rft generate`, so that its users can take their command as it is.

Invariant: what its command samples, ours samples with the same settings, its defaults included; the
whole command in our flags is told, once. docs/moving.md has the table.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import NoReturn

from eval_protocol_rft.cli._common import fail, say

_SWITCHES = ("--use_vllm", "--trust_remote_code")
_VALUES = (
    "--model_path",
    "--data_path",
    "--output_path",
    "--output_format",
    "--prompt_key",
    "--num_samples",
    "--top_p",
    "--max_tokens",
    "--batch_size",
    "--vllm_base_url",
    "--vllm_model_name",
    "--vllm_max_concurrent",
)
FLAGS = (*_SWITCHES, *_VALUES)
_DEFAULTS = {"-n": "8", "--temperature": "0.7", "--top-p": "0.9", "--max-tokens": "512"}
_URL = "http://localhost:8000/v1"
_SCRIPT = "generate_rollouts.py"


def in_our_flags(arguments: Sequence[str]) -> list[str]:
    """Arguments of `ep-rft generate` with the script's flags, if there are any, in ours; it is told
    what they are. The others stay, and go before what the script takes without its own."""
    if not any(argument.split("=")[0] in FLAGS for argument in arguments):
        return list(arguments)
    asked, others = _parser().parse_known_args(arguments)
    ours: list[str] = []
    notes: list[str] = []
    renamed = {
        "-o": asked.output_path,
        "--format": asked.output_format,
        "--prompt-key": asked.prompt_key,
        "-n": asked.num_samples,
        "--top-p": asked.top_p,
        "--max-tokens": asked.max_tokens,
    }
    given = {flag: value for flag, value in renamed.items() if value is not None}
    if asked.data_path is not None:
        ours.append(asked.data_path)
    if asked.model_path is not None:
        given |= _of_model(asked, others)
        taken = {k: v for k, v in _DEFAULTS.items() if k not in given and not _has(others, k)}
        if "-o" not in given and not _has(others, "-o", "--output"):
            ending = asked.output_format or "parquet"
            taken = {"-o": f"rollouts.{ending}", **taken}
        if taken:
            notes.append(f"{_words(taken)}: {_SCRIPT}'s defaults")
        given = {**taken, **given}
    elif asked.use_vllm:
        given["--base-url"] = asked.vllm_base_url or _URL
    if asked.use_vllm and asked.vllm_max_concurrent is not None:
        given["--concurrency"] = asked.vllm_max_concurrent
    if asked.batch_size is not None:
        notes.append("--batch_size is not needed: completions start as others end")
    if asked.trust_remote_code:
        given["--trust-remote-code"] = ""
    for flag, value in given.items():
        ours += [flag, value] if value else [flag]
    ours += others
    why = f" ({'; '.join(notes)})" if notes else ""
    say(f"ep-rft: in our flags: ep-rft generate {shlex.join(ours)}{why}", err=True)
    return ours


def _of_model(asked: argparse.Namespace, others: Sequence[str]) -> dict[str, str]:
    """What is sampled, where, and whether prompts are plain text: as the script tokenizes them for
    a model that it loads itself; on a server, where there is no chat template."""
    path = asked.model_path
    own = _has(others, "--raw", "--chat-template", "--episodes")
    if not asked.use_vllm:
        return {"--model": f"local/{path.removeprefix('local/')}", **({} if own else {"--raw": ""})}
    there = {
        "--model": asked.vllm_model_name or path,
        "--base-url": asked.vllm_base_url or _URL,
        "--tokenizer": path,
        # What vLLM needs to be started with at such a temperature; it is checked before anything
        # is sampled.
        "--logprobs-mode": "processed_logprobs",
    }
    there = {flag: value for flag, value in there.items() if not _has(others, flag)}
    raw = not own and not _has_template(there.get("--tokenizer"), trust=asked.trust_remote_code)
    return there | ({"--raw": ""} if raw else {})


def _has_template(tokenizer: str | None, *, trust: bool) -> bool:
    if tokenizer is None:
        return True
    from eval_protocol_rft.local import TokenizerError, load_tokenizer

    try:
        loaded = load_tokenizer(tokenizer, trust_remote_code=trust)
    except TokenizerError as error:
        fail(str(error))
    return loaded.chat_template_hash is not None


def _has(arguments: Sequence[str], *flags: str) -> bool:
    return any(a.split("=")[0] in flags or ("-n" in flags and a[:2] == "-n") for a in arguments)


def _words(flags: dict[str, str]) -> str:
    *before, last = (f"{flag} {value}" for flag, value in flags.items())
    return f"{', '.join(before)} and {last}" if before else last


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message, code=2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ep-rft generate", add_help=False, allow_abbrev=False)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag in _VALUES:
        parser.add_argument(flag)
    return parser
