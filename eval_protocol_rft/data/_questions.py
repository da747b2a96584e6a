"""What a job asks: which column of a data set holds the prompts, whether each can be asked, and the
selected rows as rendered prompts.

Invariant: a data set's prompts are all text, all message lists or all token ids, and all rows are
checked before the first one is asked. The same rows as Parquet and as JSONL are the same prompts. A
prompt that its chat template then fails on is a failure of its completions, and the other rows go
on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval_protocol_rft import rollout
from eval_protocol_rft.data._column_roles import (
    GroundTruth,
    RowIds,
    SourceKind,
    check_prompt,
    messages_in,
    prompt_column,
    tools_in,
    without_absent,
)
from eval_protocol_rft.data._format import CompletionRow, DataSettings, PromptKind
from eval_protocol_rft.data._sampling_run import Prompt
from eval_protocol_rft.data.source._columns import Source, SourceRow
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import PROMPT_IDS_KEY, PromptError, RolloutRequest, text_of
from eval_protocol_rft.sampling import TokenIds, derive_seeds

logger = logging.getLogger(__name__)

_TRIED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked. Made by `Questions.check`."""

    source: Source
    data: DataSettings
    system: str | None
    kind: SourceKind
    """Of the data set's prompts."""
    count: int
    """Selected rows."""
    truth: GroundTruth
    row_ids: RowIds

    @property
    def asked_kind(self) -> PromptKind:
        """Of the prompts as they are asked; ids are stored beside the text that they are of."""
        if self.kind == "ids":
            return "text"
        return self.kind if self.system is None else "messages"

    @classmethod
    def check(
        cls,
        source: Source,
        *,
        prompt_key: str | None,
        ground_truth_key: str | None,
        row_id_key: str | None,
        system: str | None,
        limit: int | None,
        shuffle_seed: int | None,
        where: str | None,
    ) -> Questions:
        """Look at every selected row. Tools are taken from a column that is called so, where the
        data set has it; `GroundTruth` and `RowIds` say the same of theirs.

        Raises:
            SourceError: there is no such column, no row is selected, or a prompt or its tools are
                wrong.
        """
        names = {column.name for column in source.columns}
        key = prompt_column(source, prompt_key)
        tools_key = "tools" if "tools" in names else None
        truth, row_ids = GroundTruth(source, key, ground_truth_key), RowIds(source, row_id_key)
        kind: SourceKind | None = None
        count = in_text = 0
        for row in source.rows(limit=limit, shuffle_seed=shuffle_seed, where=where):
            kind = check_prompt(row, key, kind)
            in_text += kind == "messages" and isinstance(row.values[key], str)
            if kind == "messages":
                _check_parts(row, key)
            _tools(source, row, tools_key)
            truth.look(row)
            row_ids.look(row)
            count += 1
        if kind is None:
            raise SourceError(f"{source.name}: no row is selected; look at --where and --limit")
        if kind == "ids" and system is not None:
            raise SourceError(
                f"{source.name}: the prompts in {key!r} are sampled from as they are, and a system "
                "message would not reach them: leave it out, or name a column of text or messages "
                "with --prompt-key"
            )
        if in_text:
            logger.warning(
                "%s: %d of %d prompts in %r are lists of messages written as JSON text; they are "
                "asked as the messages that they hold",
                source.name,
                in_text,
                count,
                key,
            )
        if said := truth.said():
            logger.warning("%s: %s", source.name, said)
        row_ids.check(lambda: source.rows(limit=limit, shuffle_seed=shuffle_seed, where=where))
        data = DataSettings(
            name=source.name,
            fingerprint=source.fingerprint,
            num_rows=source.num_rows,
            prompt_key=key,
            tools_key=tools_key,
            ground_truth_key=None if truth.path is None else truth.path.key,
            row_id_key=None if row_ids.path is None else row_ids.path.key,
            limit=limit,
            shuffle_seed=shuffle_seed,
            where=where,
        )
        return cls(source, data, system, kind, count, truth, row_ids)

    def rows(self) -> Iterator[SourceRow]:
        """The selected rows."""
        data = self.data
        return self.source.rows(limit=data.limit, shuffle_seed=data.shuffle_seed, where=data.where)

    def render_first(self, tokenizer: LoadedTokenizer, request: RolloutRequest) -> None:
        """Render the first prompts until one succeeds: where none of 16 does, it is the tokenizer
        that cannot do it.

        Raises:
            PromptError: none can be rendered exactly; the message is of the first.
        """
        first = None
        for row in itertools.islice(self.rows(), _TRIED_ROWS):
            ids = self._render(row, tokenizer, request)
            if not isinstance(ids, PromptError):
                return
            first = first or ids
        if first is not None:
            raise first

    def rendered_otherwise(
        self,
        stored: Mapping[int, TokenIds],
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
    ) -> list[int]:
        """Those data rows of `stored`, by `data_idx`, whose prompt ids are others now: their chat
        template says the date, or the tokenizer is another under the same name."""
        changed: list[int] = []
        left = len(stored)
        for row in self.rows():
            if not left:
                break
            if row.data_idx in stored:
                left -= 1
                ids = self._render(row, tokenizer, request)
                if not isinstance(ids, PromptError) and ids != stored[row.data_idx]:
                    changed.append(row.data_idx)
        return changed

    def lengths(
        self,
        missing: Callable[[int], list[int]],
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
        least: int,
    ) -> Iterator[tuple[str, int | None]]:
        """(place, tokens) of the prompts of which completions are missing; None of those that are
        too short to have `least`, which are not rendered for it, or cannot be rendered."""
        for row in self.rows():
            if not missing(row.data_idx):
                continue
            length = None
            if _most_tokens(row.values[self.data.prompt_key], self._tools(row)) >= least:
                ids = self._render(row, tokenizer, request)
                length = None if isinstance(ids, PromptError) else len(ids)
            yield row.where, length

    def prompts(
        self,
        missing: Callable[[int], list[int]],
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
        *,
        name: str,
        rendered: bool,
        context: int | None = None,
    ) -> Iterator[Prompt]:
        """The rows of which completions are missing, by their `data_idx`, rendered one by one if
        they are to be; `name` goes into the `row_id` of those without their own. `max_tokens` is at
        most what `context`, if it is known, leaves; a prompt that it does not hold is an error.

        Raises:
            SourceError: a file of the data set has changed meanwhile.
        """
        params = request.params
        for row in self.rows():
            samples = missing(row.data_idx)
            if not samples:
                continue
            # Without messages where they are none that the file could hold.
            asked: Any = "" if self.kind == "ids" else []
            ids: TokenIds | PromptError | None = None
            most = params.max_tokens
            try:
                asked = self._prompt(row, tokenizer)
                if rendered:
                    ids = self._ids(row, asked, tokenizer, request)
                    most = _room(len(ids), most, context)
            except PromptError as error:
                ids = PromptError(f"{row.where}: {error}")
            shared = CompletionRow(
                row_id=self.row_ids.of(row) or f"{name}-{row.data_idx}",
                data_idx=row.data_idx,
                sample_idx=0,
                prompt=asked,
                tools=self._tools(row),
                ground_truth=None if self.truth.path is None else self.truth.path.of(row),
                prompt_ids=None if not isinstance(ids, tuple) else np.array(ids, np.int32),
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=most,
                original=row.values,
            )
            seeds = derive_seeds(request.seed, str(row.data_idx), request.n)
            yield Prompt(shared, ids, samples, seeds)
        # Looks whether the files are still those that were opened.
        self.source.rows(limit=0)

    def _tools(self, row: SourceRow) -> list[dict[str, Any]] | None:
        """What is rendered into the prompt."""
        return None if self.kind == "ids" else _tools(self.source, row, self.data.tools_key)

    def _prompt(self, row: SourceRow, tokenizer: LoadedTokenizer) -> Any:
        """What is asked: the text, that of the ids, or the messages up to the last that is not the
        assistant's."""
        asked = _value(self.source, row, self.data.prompt_key)
        if self.kind == "ids":
            return tokenizer.decode(list(rollout.given_prompt(asked, tokenizer)))
        if self.kind == "text":
            if self.system is None:
                return asked
            messages = [{"role": "user", "content": asked}]
        else:
            said = (messages_in(asked) or ()) if isinstance(asked, str) else asked
            messages = rollout.chat_messages(said, tokenizer)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _render(
        self, row: SourceRow, tokenizer: LoadedTokenizer, request: RolloutRequest
    ) -> TokenIds | PromptError:
        try:
            return self._ids(row, self._prompt(row, tokenizer), tokenizer, request)
        except PromptError as error:
            return PromptError(f"{row.where}: {error}")

    def _ids(
        self, row: SourceRow, asked: Any, tokenizer: LoadedTokenizer, request: RolloutRequest
    ) -> TokenIds:
        """The ids of the prompt that `_prompt` said."""
        options = request.chat_template_kwargs
        if self.kind == "ids":
            if options:
                raise PromptError(
                    f"{PROMPT_IDS_KEY} are sampled from as they are, and "
                    f"{', '.join(options)} would reach no chat template: leave it out"
                )
            value = _value(self.source, row, self.data.prompt_key)
            return rollout.given_prompt(value, tokenizer)
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return rollout.render_request(messages, self._tools(row), tokenizer, request)


_AROUND = 1024
"""Tokens that a chat template may put around a conversation."""


def _most_tokens(asked: Any, tools: Any) -> int:
    """No prompt of this has more tokens: one is a byte at least."""
    if isinstance(asked, list) and not (asked and isinstance(asked[0], dict)):
        return len(asked)
    return len(f"{asked}{tools or ''}".encode(errors="replace")) + _AROUND


def _room(prompt_tokens: int, max_tokens: int | None, context: int | None) -> int | None:
    """`max_tokens`, or what the context leaves.

    Raises:
        PromptError: it leaves nothing.
    """
    if context is None:
        return max_tokens
    if prompt_tokens >= context:
        raise PromptError(
            f"the prompt has {prompt_tokens} tokens, and the model's context of {context} must "
            "hold at least one more"
        )
    return None if max_tokens is None else min(max_tokens, context - prompt_tokens)


def _check_parts(row: SourceRow, key: str) -> None:
    """Images and sounds are refused here: asked row by row, they would come up after much was paid
    for."""
    value = row.values[key]
    messages = messages_in(value) if isinstance(value, str) else value
    for i, message in enumerate(messages or ()):
        try:
            text_of(i, message.get("content"))
        except PromptError as error:
            raise SourceError(f"{row.where}: the prompt in {key!r}: {error}") from error


def _tools(source: Source, row: SourceRow, key: str | None) -> list[dict[str, Any]] | None:
    """The tools of a row, in the chat API's form."""
    if key is None:
        return None
    return tools_in(_value(source, row, key), f"{row.where}: {key!r}")


def _value(source: Source, row: SourceRow, key: str) -> Any:
    (column,) = (column for column in source.columns if column.name == key)
    return without_absent(row.values[key], column.type)
