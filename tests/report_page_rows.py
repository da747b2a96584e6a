"""A small rollout file with the bundled tokenizer, and its page read back."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, SamplingSettings, schema
from eval_protocol_rft.record import Score
from eval_protocol_rft.report._page import WrittenReport, write_report

END = 258
"""The bundled tokenizer's end-of-turn token. Its ids are bytes in an order of its own."""

HOSTILE = "</script><script>pwned=1</script><!--<img src=x onerror=pwned=2>&amp;"
UNSEEN = "\x00\x1b[31m \u202egnp.exe\u202c \u200b \U000e0041"


def metadata(**changes: Any) -> FileMetadata:
    sampling = SamplingSettings(
        model="local/arithmetic",
        tokenizer="local/arithmetic",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=64,
        n=4,
    )
    return FileMetadata(**{"sampling": sampling, **changes})


def encode(text: str) -> list[int]:
    from eval_protocol_rft.report._page_detail import load_token_texts

    tokenizer = load_token_texts("local/arithmetic")._tokenizer.tokenizer
    return list(tokenizer.encode(text, add_special_tokens=False))


def completion(
    data_idx: int,
    sample_idx: int,
    text: str = "7",
    reward: float | None = 1.0,
    *,
    logprobs: Sequence[float] | None = None,
    **fields: Any,
) -> CompletionRow:
    """A completion of `text` that ended its turn; `truncated=True`: that did not."""
    cut = bool(fields.get("truncated"))
    ids = encode(text) + ([] if cut else [END])
    given = {
        "prompt": f"What is {data_idx}+0?",
        "prompt_ids": np.array(encode(f"What is {data_idx}+0?"), np.int32),
        "completion_ids": np.array(ids, np.int32),
        "logprobs": np.array(
            logprobs if logprobs is not None else [-0.25 * (t % 9) for t in range(len(ids))],
            np.float32,
        ),
        "response": text,
        "finish_reason": "length" if cut else "stop",
        "truncated": cut,
        "scores": {} if reward is None else {"reward": Score(reward=reward, reason="as it is")},
    }
    return CompletionRow(
        row_id=f"row-{data_idx}", data_idx=data_idx, sample_idx=sample_idx, **(given | fields)
    )


def failed(data_idx: int, sample_idx: int, message: str = "HTTP 503: overloaded") -> CompletionRow:
    return CompletionRow(
        row_id=f"row-{data_idx}",
        data_idx=data_idx,
        sample_idx=sample_idx,
        prompt=f"What is {data_idx}+0?",
        error=message,
        error_kind="unavailable",
        error_status=503,
        attempts=5,
    )


def dataset(
    folder: Path, rows: Sequence[CompletionRow], about: FileMetadata | None = None
) -> RolloutDataset:
    path = folder / "rollouts.parquet"
    write_rows(path, schema(about or metadata(), {}), list(rows))
    return RolloutDataset(path)


def report(
    folder: Path, rows: Sequence[CompletionRow], about: FileMetadata | None = None, **options: Any
) -> tuple[WrittenReport, Page]:
    written = write_report(dataset(folder, rows, about), folder / "report.html", **options)
    return written, Page(written.path.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What an HTML parser sees in a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        """Contents of script elements, by id or type."""
        self.style = ""
        self.text = ""
        """All text outside of scripts and styles, white space as it is."""
        self.facts: list[tuple[str, str]] = []
        """Names and values of the head's lists."""
        self._within: tuple[str, str] | None = None
        self._last = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._last = tag
        if tag in ("script", "style"):
            self._within = (tag, attributes.get("id") or attributes.get("type") or "")
            if tag == "script":
                assert self._within[1] not in self.scripts
                self.scripts[self._within[1]] = ""

    def handle_endtag(self, tag: str) -> None:
        if self._within is not None and tag == self._within[0]:
            self._within = None

    def handle_data(self, data: str) -> None:
        if self._within is None:
            self.text += data
            if self._last == "dt" and data.strip():
                self.facts.append((data, ""))
            elif self._last == "dd" and data.strip():
                self.facts[-1] = (self.facts[-1][0], data)
        elif self._within[0] == "script":
            self.scripts[self._within[1]] += data
        else:
            self.style += data

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())

    @property
    def index(self) -> Any:
        return json.loads(self.scripts["index"])

    def packed(self, name: str) -> Any:
        return msgspec.json.decode(zlib.decompress(base64.b64decode(self.scripts[name])))

    def tokens(self, numbers: Sequence[int]) -> list[list[Any]]:
        """[id, text, kind] of each token."""
        vocabulary = self.packed("vocabulary")
        return [vocabulary[number] for number in numbers]
