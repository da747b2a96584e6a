"""The selected rows of a data set as prompts.

Invariant: all rows are checked before the first one is asked. A prompt that its chat template then
fails on is a failure of its completions, and the other rows go on.

Which completions a job has, and which it still misses.

Invariant: one byte per completion asked for, whatever the completions hold.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.data._job_store import Keys, split_keys
from eval_protocol_rft.data._sampling_run import Prompt
from eval_protocol_rft.data.rollouts._format import PromptKind
from eval_protocol_rft.data.rollouts._rows import CompletionRow
from eval_protocol_rft.data.source._prompt import PromptKind as SourceKind
from eval_protocol_rft.data.source._prompt import (
    check_prompt,
    messages_in,
    tools_in,
    without_absent,
)
from eval_protocol_rft.data.source._types import Source, SourceRow
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import (
    PROMPT_IDS_KEY,
    PromptError,
    RolloutRequest,
    chat_messages,
    given_prompt,
    render_chat,
    text_of,
)
from eval_protocol_rft.sampling import TokenIds, derive_seeds

logger = logging.getLogger(__name__)

_TRIED_ROWS = 16
_MISSING, _DONE, _FAILED = 0, 1, 2


class DoneIndex:
    """The state of every completion.

    Args:
        num_rows: of the data set.
        n: completions per row.
        position: `data_idx` -> place in the run; None where that is `data_idx` itself.
    """

    def __init__(self, num_rows: int, n: int, position: Keys | None = None) -> None:
        self._states = np.zeros((num_rows, n), np.uint8)
        self._position = position

    def add(self, keys: Keys, failed: NDArray[np.bool_]) -> None:
        """Take up rows that are stored, by their `row_keys`; later ones count."""
        self._states[split_keys(keys)] = np.where(failed, _FAILED, _DONE)

    def missing(self, data_idx: int, *, retry_failed: bool) -> list[int]:
        """The `sample_idx` that are to be sampled."""
        place = data_idx if self._position is None else self._position[data_idx]
        states = self._states[place]
        wanted = states != _DONE if retry_failed else states == _MISSING
        return [int(i) for i in np.flatnonzero(wanted)]

    @property
    def done(self) -> int:
        """Completions that are there."""
        return int(np.count_nonzero(self._states == _DONE))

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(self._states == _FAILED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows of a data set are asked, and which of their columns matter."""

    prompt_key: str
    tools_key: str | None = None
    ground_truth_key: str | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    where: str | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        prompt_key: str,
        limit: int | None,
        shuffle_seed: int | None,
        where: str | None,
    ) -> Selection:
        """With `tools` and `ground_truth` where the data set has columns of that name."""
        names = {column.name for column in source.columns}
        return cls(
            prompt_key=prompt_key,
            tools_key="tools" if "tools" in names else None,
            ground_truth_key="ground_truth" if "ground_truth" in names else None,
            limit=limit,
            shuffle_seed=shuffle_seed,
            where=where,
        )

    @property
    def rows(self) -> dict[str, Any]:
        """Arguments of `Source.rows`."""
        return {"limit": self.limit, "shuffle_seed": self.shuffle_seed, "where": self.where}


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked. Made by `Questions.check`."""

    source: Source
    selection: Selection
    system: str | None
    kind: SourceKind
    """Of the data set's prompts."""
    count: int
    """Selected rows."""

    @property
    def asked_kind(self) -> PromptKind:
        """Of the prompts as they are asked; ids are stored beside the text that they are of."""
        if self.kind == "ids":
            return "text"
        return self.kind if self.system is None else "messages"

    @classmethod
    def check(cls, source: Source, selection: Selection, system: str | None) -> Questions:
        """Look at every selected row.

        Raises:
            SourceError: no row is selected, or a prompt or its tools are wrong.
        """
        kind: SourceKind | None = None
        count = in_text = 0
        key = selection.prompt_key
        for row in source.rows(**selection.rows):
            kind = check_prompt(row, key, kind)
            in_text += kind == "messages" and isinstance(row.values[key], str)
            if kind == "messages":
                _check_parts(row, key)
            _tools(source, row, selection.tools_key)
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
        return cls(source, selection, system, kind, count)

    def render_first(self, tokenizer: LoadedTokenizer, request: RolloutRequest) -> None:
        """Render the first prompts until one succeeds: where none of 16 does, it is the tokenizer
        that cannot do it.

        Raises:
            PromptError: none can be rendered exactly; the message is of the first.
        """
        first = None
        for row in itertools.islice(self.source.rows(**self.selection.rows), _TRIED_ROWS):
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
        for row in self.source.rows(**self.selection.rows):
            if not left:
                break
            if row.data_idx in stored:
                left -= 1
                ids = self._render(row, tokenizer, request)
                if not isinstance(ids, PromptError) and ids != stored[row.data_idx]:
                    changed.append(row.data_idx)
        return changed

    def prompts(
        self,
        done: DoneIndex,
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
        *,
        name: str,
        retry_failed: bool,
        rendered: bool = True,
    ) -> Iterator[Prompt]:
        """The rows with completions that are not there yet, rendered one by one if they are to be;
        `name` goes into their `row_id`.

        Raises:
            SourceError: a file of the data set has changed meanwhile.
        """
        params = request.params
        for row in self.source.rows(**self.selection.rows):
            samples = done.missing(row.data_idx, retry_failed=retry_failed)
            if not samples:
                continue
            ids: TokenIds | PromptError | None
            if rendered:
                ids = self._render(row, tokenizer, request)
            else:
                ids = self._problem(row, tokenizer)
            shared = CompletionRow(
                row_id=f"{name}-{row.data_idx}",
                data_idx=row.data_idx,
                sample_idx=0,
                prompt=self._prompt_to_store(row, tokenizer),
                tools=self._tools(row),
                ground_truth=row.values.get(self.selection.ground_truth_key or ""),
                prompt_ids=None if not isinstance(ids, tuple) else np.array(ids, np.int32),
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_tokens,
                original=row.values,
            )
            seeds = derive_seeds(request.seed, str(row.data_idx), request.n)
            yield Prompt(shared, ids, samples, seeds)
        # Looks whether the files are still those that were opened.
        self.source.rows(limit=0)

    def _tools(self, row: SourceRow) -> list[dict[str, Any]] | None:
        """What is rendered into the prompt."""
        return None if self.kind == "ids" else _tools(self.source, row, self.selection.tools_key)

    def _prompt(self, row: SourceRow, tokenizer: LoadedTokenizer) -> Any:
        """What is asked: the text, that of the ids, or the messages up to the last that is not the
        assistant's."""
        asked = _value(self.source, row, self.selection.prompt_key)
        if self.kind == "ids":
            return tokenizer.decode(list(given_prompt(asked, tokenizer)))
        if self.kind == "text":
            if self.system is None:
                return asked
            messages = [{"role": "user", "content": asked}]
        else:
            said = (messages_in(asked) or ()) if isinstance(asked, str) else asked
            messages = chat_messages(said, tokenizer)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _prompt_to_store(self, row: SourceRow, tokenizer: LoadedTokenizer) -> Any:
        """The prompt, without messages where they are none that the file could hold."""
        try:
            return self._prompt(row, tokenizer)
        except PromptError:
            return "" if self.kind == "ids" else []

    def _problem(self, row: SourceRow, tokenizer: LoadedTokenizer) -> PromptError | None:
        """Why its messages cannot be asked; None where they can."""
        try:
            self._prompt(row, tokenizer)
        except PromptError as error:
            return PromptError(f"{row.where}: {error}")
        return None

    def _render(
        self, row: SourceRow, tokenizer: LoadedTokenizer, request: RolloutRequest
    ) -> TokenIds | PromptError:
        try:
            if self.kind == "ids":
                if request.chat_template_kwargs:
                    raise PromptError(
                        f"{PROMPT_IDS_KEY} are sampled from as they are, and "
                        f"{', '.join(request.chat_template_kwargs)} would reach no chat template: "
                        "leave it out"
                    )
                return given_prompt(_value(self.source, row, self.selection.prompt_key), tokenizer)
            prompt = self._prompt(row, tokenizer)
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            tools = self._tools(row)
            return render_chat(prompt, tools, tokenizer, request.chat_template_kwargs)
        except PromptError as error:
            return PromptError(f"{row.where}: {error}")


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
