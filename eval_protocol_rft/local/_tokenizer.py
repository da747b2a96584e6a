"""One tokenizer per process and name, and text from sampled ids.

Invariant: ids become text, never the reverse. `decode_completion` reads sampled ids; it leaves out
only the token that ended the turn and a stop string, which are in the ids and not in the answer.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local.models import (
    LOCAL_PREFIX,
    VLLM_PREFIX,
    NoSuchModelError,
    local_model_folder,
    vllm_source,
)
from eval_protocol_rft.sampling import TOKEN_ID_LIMIT, Completion, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerError(EvalProtocolRftError, ValueError):
    """The tokenizer cannot be loaded, or lacks what training needs."""


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer with what is worth computing once."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    special_ids: frozenset[int] = field(repr=False)
    """Ids of control tokens (end of turn, end of text, ...); never of `<think>` and the like, which
    tokenizers list as ordinary added tokens."""
    chat_template_hash: str | None
    special_texts: tuple[str, ...] = field(default=(), repr=False)
    """What control tokens are written as."""
    added_texts: tuple[str, ...] = field(default=(), repr=False)
    """What all added tokens are written as, the longest first."""
    size: int = field(default=TOKEN_ID_LIMIT, repr=False)
    """No id is as high."""
    is_plain: bool = field(default=False, repr=False)
    """Whether it does nothing with a text or ids but ask its backend, which takes a third to a half
    of the time."""

    @classmethod
    def wrap(cls, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> LoadedTokenizer:
        """Take a tokenizer object as it is. `name` goes into the record.

        Raises:
            TokenizerError: it is not a transformers tokenizer.
        """
        if not hasattr(tokenizer, "apply_chat_template") or not hasattr(tokenizer, "decode"):
            raise TokenizerError(
                f"a {type(tokenizer).__name__} is no tokenizer: give a folder, a hub id or a "
                "transformers tokenizer"
            )
        added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token for token, entry in added.items() if getattr(entry, "special", False)}
        special.update(tokenizer.all_special_ids)
        template = getattr(tokenizer, "chat_template", None)
        return cls(
            tokenizer=tokenizer,
            name=name or str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__,
            special_ids=frozenset(special),
            chat_template_hash=_hash(template) if template else None,
            special_texts=tuple(
                str(text) for text in tokenizer.convert_ids_to_tokens(sorted(special)) if text
            ),
            added_texts=tuple(sorted(map(str, added.values()), key=len, reverse=True)),
            size=_size(tokenizer),
            is_plain=_is_plain(tokenizer),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text that a chat template rendered, as transformers reads it: control tokens are
        read as such, and none is added."""
        if self.is_plain and not self.tokenizer.split_special_tokens:
            backend: Any = self.tokenizer.backend_tokenizer
            if not (backend.truncation or backend.padding or backend.encode_special_tokens):
                ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
                return ids
        read = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [int(token) for token in read]

    def encode_raw(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text that no template rendered, exactly as `tokenizer(text)` reads it: control
        tokens that are written in it are read as such."""
        read = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(token) for token in read]

    def with_template(self, template: str) -> LoadedTokenizer:
        """The same with another chat template."""
        other = copy.copy(self.tokenizer)
        other.chat_template = template
        return replace(self, tokenizer=other, chat_template_hash=_hash(template))

    def read(
        self,
        completion: Completion,
        params: SamplingParams,
        look: Callable[[LoadedTokenizer, str, Completion], None] | None = None,
    ) -> Completion:
        """The completion as it is kept: it ends where the server says that it ended, and its `text`
        is the answer, decoded here.

        Tokens behind that end (speculative decoding hands out some) are in `past_end`, and nowhere
        else: no evaluator saw them, and no later turn may hold them.

        Args:
            look: told what is read in the ids before anything is cut; may raise.
        """
        body = self.decode_body(completion)
        if look is not None:
            look(self, body, completion)
        end = self._end(body, completion, params)
        if end is not None and end < len(completion.token_ids):
            completion = _cut(completion, end)
            body = self.decode_body(completion)
        return replace(completion, text=self.answer(body, completion, params))

    def ender(self, completion: Completion) -> int | None:
        """The token that ended the turn, where one was sampled."""
        last, named = completion.token_ids[-1], completion.stop_reason
        if completion.finish_reason != "stop":
            return None
        if last not in self.special_ids:
            return last if named == last else None
        # A stop string may be the text of a control token, or stand before one by chance.
        by_string = isinstance(named, str) and not named.endswith(self.decode([last]))
        return None if by_string else last

    def decode_completion(self, completion: Completion, params: SamplingParams) -> str:
        """The completion's text: without the token that ended the turn, cut before the stop string
        that ended it (as servers cut it), all other tokens as they are.
        """
        return self.answer(self.decode_body(completion), completion, params)

    def decode_body(self, completion: Completion) -> str:
        """All that was sampled but the token that ended the turn."""
        ids = completion.token_ids
        return self.decode(ids if self.ender(completion) is None else ids[:-1])

    def answer(self, body: str, completion: Completion, params: SamplingParams) -> str:
        """`decode_completion`, from what `decode_body` gave."""
        stop = self._stop(body, completion, params)
        return body if stop is None else body[: stop[0]]

    def _end(self, body: str, completion: Completion, params: SamplingParams) -> int | None:
        """How many tokens there are up to the end that the server names; None: all."""
        ids, named = completion.token_ids, completion.stop_reason
        if completion.finish_reason != "stop":
            return None
        if isinstance(named, int):
            return ids.index(named) + 1 if named in ids and ids[-1] != named else None
        stop = self._stop(body, completion, params)
        if stop is None or stop[1] >= len(body):
            return None
        kept = body[: stop[1]]
        return bisect_left(
            range(len(ids)), True, lo=1, key=lambda k: self.decode(ids[:k]).startswith(kept)
        )

    def _stop(
        self, body: str, completion: Completion, params: SamplingParams
    ) -> tuple[int, int] | None:
        """Where in `body` the answer ends, for the stop string that ended the completion (before
        it, or behind one that is to be kept), and where the stop string ends.

        The server's word goes first: the string that it names, and of several places the one where
        its text ends: before the string, or behind it where the request keeps stop strings. Where
        it says nothing, the first place behind `min_tokens`.
        """
        named, text = completion.stop_reason, completion.text
        stops = (named,) if isinstance(named, str) else params.stop
        if completion.finish_reason != "stop" or not stops:
            return None
        kept = bool(params.extra.get("include_stop_str_in_output"))
        places = sorted((at, at + len(stop)) for stop in stops for at in _places(body, stop))
        if text is not None:
            if named is None and self._same(text, body):
                return None
            # As was asked first: "aab" of "aabab" is cut before one "ab", and behind another.
            for with_stop in (kept, not kept):
                for start, end in places:
                    cut = end if with_stop else start
                    if self._same(text, body[:cut]):
                        return cut, end
        if named is None and self.ender(completion) is not None:
            return None
        unwatched = self._unwatched(completion, params)
        for start, end in places:
            if end > unwatched:
                return (end if kept else start), end
        # A pattern that the server matched (SGLang's `stop_regex`).
        matched = named is not None and text and body.startswith(text)
        return (len(text), len(body)) if matched and text else None

    def _unwatched(self, completion: Completion, params: SamplingParams) -> int:
        """Characters in which servers look for no stop string: those of the first `min_tokens`."""
        count = params.extra.get("min_tokens")
        if not isinstance(count, int) or count < 1:
            return 0
        return len(self.decode(completion.token_ids[:count]))

    def _same(self, text: str, ours: str) -> bool:
        """Whether a server shows `ours` as `text`: it may leave out control tokens, and the blank
        before the first word."""
        return text == ours or self._shown(text) == self._shown(ours)

    def _shown(self, text: str) -> str:
        for token in self.special_texts:
            text = text.replace(token, "")
        return text.removeprefix(" ")

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to the text of `before`. Tokenizers that write word starts as a leading
        blank (SentencePiece) leave that blank out where a text begins, and only there."""
        shown, whole = self.decode(list(before)), self.decode([*before, *ids])
        return whole[len(shown) :] if whole.startswith(shown) else self.decode(list(ids))

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control tokens included, no clean-up of spaces."""
        if self.is_plain:
            backend: Any = self.tokenizer.backend_tokenizer
            decoded: str = backend.decode(ids, skip_special_tokens=False)
            return decoded
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template `chatml`: roles and contents, no tools."""
_TEMPLATES = {"chatml": CHATML}


def chat_template_text(name: str, *, trust_remote_code: bool = False) -> str:
    """The chat template that `name` means: a template itself, the path of one, `chatml`, or the
    folder or hub id (also `local/...`) of a tokenizer that has one. Blocks: call it in a thread.

    Raises:
        TokenizerError: it means none.
    """
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    if "{{" in name or "{%" in name:
        return name
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the chat template {name}: {error}") from error
    known = f"name a Jinja file, {' or '.join(_TEMPLATES)}, or a tokenizer that has one"
    if path.suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        raise TokenizerError(f"chat template {name}: there is no such file: {known}")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, patient=False)
    except TokenizerError as error:
        raise TokenizerError(
            f"chat template {name!r}: neither a file nor a tokenizer that can be loaded: {known}"
        ) from error
    template = getattr(tokenizer.tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise TokenizerError(f"chat template {name!r}: that tokenizer has none itself: {known}")
    return template


_MARK = re.compile(r"<\|[^|<>{}\s]+\|>|<(?:start|end)_of_turn>")


def unknown_marks(tokenizer: LoadedTokenizer) -> list[str]:
    """What its chat template writes to mark turns, and is no token of the tokenizer."""
    template = str(getattr(tokenizer.tokenizer, "chat_template", None) or "")
    marks = dict.fromkeys(_MARK.findall(template))
    return [mark for mark in marks if len(tokenizer.encode(mark)) > 1]


FAILURE_SECONDS = 10.0
"""For so long a name that could not be loaded is not tried again: a hub that cannot be reached
takes most of a minute to say so, and every row of a data set would ask."""

HUB_SECONDS = 5.0
"""What a hub that is asked once has for its answer."""

_LOADED: dict[tuple[str, bool], LoadedTokenizer] = {}
_FAILED: dict[tuple[str, bool], tuple[float, str]] = {}
"""When it failed, and how."""
_LOADING = threading.Lock()


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, patient: bool = True
) -> LoadedTokenizer:
    """Load a tokenizer by folder, hub id, or as `local/...` and `vllm/...` name models, once per
    process. Blocks: call it in a thread.

    Args:
        patient: try a hub that cannot be reached for as long as its own client does, which is most
            of a minute. Else the hub is asked once, and only for what is not on this machine.

    Raises:
        TokenizerError: there is no such tokenizer, or its files cannot be read.
    """
    key = (name, trust_remote_code)
    with _LOADING:
        if key in _LOADED:
            return _LOADED[key]
        failed_at, message = _FAILED.get(key, (-math.inf, ""))
        if time.monotonic() - failed_at < FAILURE_SECONDS:
            raise TokenizerError(message)
        try:
            folder = name
            if name.startswith(LOCAL_PREFIX):
                folder = str(local_model_folder(name))
            elif name.startswith(VLLM_PREFIX):
                folder = vllm_source(name)
            tokenizer = _from_pretrained(folder, trust_remote_code, patient=patient)
            _LOADED[key] = LoadedTokenizer.wrap(tokenizer, name)
        except NoSuchModelError as error:
            raise TokenizerError(f"cannot load tokenizer {name!r}: {error}") from error
        except TokenizerError as error:
            _FAILED[key] = (time.monotonic(), str(error))
            raise
        return _LOADED[key]


def _from_pretrained(
    name: str, trust_remote_code: bool, *, patient: bool
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    def load(**options: Any) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
        return tokenizer

    try:
        if patient:
            return load()
        try:
            return load(local_files_only=True)
        except OSError:
            if not _hub_has(name):
                raise
        return load()
    # Broken files raise what the parser happens to stumble on, the tokenizers library a bare
    # Exception; as an OSError it would make Eval Protocol run the whole row four times over.
    except Exception as error:
        raise TokenizerError(
            f"cannot load tokenizer {name!r}: {error}. Name a folder or a hub id with tokenizer "
            "files, as FireworksTrainingRolloutProcessor(tokenizer=...) or as "
            'completion_params["tokenizer"].'
        ) from error


def _hub_has(name: str) -> bool:
    """Whether the hub, asked once, has a model of that name."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    # Not there, no name that a hub could have, offline mode, or whatever its HTTP library raises.
    except Exception:  # noqa: BLE001
        return False
    return True


def _places(body: str, stop: str) -> Iterator[int]:
    at = body.find(stop)
    while at >= 0:
        yield at
        at = body.find(stop, at + 1)


def _cut(completion: Completion, end: int) -> Completion:
    """The first `end` tokens."""
    raw, routing = completion.raw_logprobs, completion.routing_matrices
    return replace(
        completion,
        token_ids=completion.token_ids[:end],
        logprobs=completion.logprobs[:end],
        raw_logprobs=None if raw is None else raw[:end],
        routing_matrices=None if routing is None else routing[:end],
        past_end=completion.token_ids[end:],
    )


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id, which may lie above the number of tokens."""
    try:
        return max(tokenizer.get_vocab().values(), default=-1) + 1
    except (AttributeError, NotImplementedError):
        return TOKEN_ID_LIMIT


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    from transformers import PreTrainedTokenizerFast as Plain

    kind = type(tokenizer)
    return isinstance(tokenizer, Plain) and all(
        getattr(kind, name) is getattr(Plain, name)
        for name in ("__call__", "_encode_plus", "decode", "_decode")
    )


def _hash(template: Any) -> str:
    text = template if isinstance(template, str) else repr(sorted(template.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
