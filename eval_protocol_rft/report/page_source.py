"""Which tokenizer gives the tokens of a prompt group their texts.

Invariant: a tokenizer is named by the user or by the file, never guessed from the model's name. One
that cannot be loaded costs the texts of its groups, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from eval_protocol_rft.batch.rollouts.format import FileMetadata
from eval_protocol_rft.batch.rollouts.rows import CompletionRow
from eval_protocol_rft.report.page_tokens import TokenTexts, load_token_texts
from eval_protocol_rft.tokenizer import TokenizerError


class TextSource:
    """Finds tokenizers for groups, and loads each once.

    Args:
        metadata: of the file.
        tokenizer: name of the one to take in place of what the file says.
    """

    def __init__(self, metadata: FileMetadata, tokenizer: str | None) -> None:
        self._metadata = metadata
        self._chosen = tokenizer
        self._loaded: dict[str, TokenTexts | None] = {}
        self._seen: dict[str, dict[str, None]] = {"Model": {}, "Tokenizer": {}}
        self.problems: dict[str, None] = {}
        """Why tokens are shown as ids, each reason once."""

    def texts(self, group: Sequence[CompletionRow]) -> TokenTexts | None:
        """Token texts for the completions of one prompt, None where there are none to be had."""
        name = self._chosen or self._recorded(group)
        if name is None:
            self.problems["the file does not say which tokenizer they are of"] = None
            return None
        if name not in self._loaded:
            try:
                self._loaded[name] = load_token_texts(name)
            except TokenizerError as error:
                self.problems[str(error)] = None
                self._loaded[name] = None
        return self._loaded[name]

    def note(self, group: Sequence[CompletionRow]) -> None:
        """Remember how the rows say they were sampled, where the file does not say it for all."""
        if self._metadata.sampling is None:
            sampling = _row_sampling(group)
            self._seen["Model"][sampling.model or "not recorded"] = None
            self._seen["Tokenizer"][sampling.tokenizer or "not recorded"] = None

    @property
    def sources(self) -> Mapping[str, str]:
        """What rows said of their sampling, as facts."""
        return {name: ", ".join(values) for name, values in self._seen.items() if values}

    def _recorded(self, group: Sequence[CompletionRow]) -> str | None:
        if self._metadata.sampling is not None:
            return self._metadata.sampling.tokenizer
        return _row_sampling(group).tokenizer


class _Sampling(msgspec.Struct):
    model: str | None = None
    tokenizer: str | None = None


class _Extra(msgspec.Struct):
    sampling: _Sampling = msgspec.field(default_factory=_Sampling)


class _Execution(msgspec.Struct):
    extra: _Extra | None = None


class _Row(msgspec.Struct):
    execution_metadata: _Execution = msgspec.field(default_factory=_Execution)


def _row_sampling(group: Sequence[CompletionRow]) -> _Sampling:
    """What the group's row of Eval Protocol says of its sampling."""
    text = group[0].evaluation_row
    extra = None if text is None else msgspec.json.decode(text, type=_Row).execution_metadata.extra
    return _Sampling() if extra is None else extra.sampling
