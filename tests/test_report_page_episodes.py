"""The page shows an episode whole: every turn, what came between, and how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._episodes import as_lists
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import EpisodeSettings, FormatError
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.report._page import write_report
from eval_protocol_rft.sampling._types import Completion, SamplingParams, TokenIds
from tests.episodes import templates
from tests.report_page_rows import Page, completion, dataset, metadata, report

THOUGHT = "<think>seven and one</think>"


def tokenizer(template: str = templates.APPENDS) -> LoadedTokenizer:
    plain = templates.bundled().tokenizer
    plain.chat_template = template
    return LoadedTokenizer.wrap(plain, "local/arithmetic")


class Scripted:
    """Says what `script(episode, turn)` gives; each token has a logprob of its own.

    Episodes run side by side: they are numbered as they begin, and known by how they began.
    """

    def __init__(self, tokenizer: LoadedTokenizer, script: Callable[[int, int], str]) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.beginnings: list[str] = []
        self.sampled = 0

    async def sample(
        self, prompt_ids: TokenIds, params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        text = self.tokenizer.decode(list(prompt_ids))
        turn = text.count("<|im_start|>assistant") - 1
        episode = len(self.beginnings)
        if turn:
            episode = next((e for e, began in enumerate(self.beginnings) if began in text), 0)
        said = self.script(episode, turn)
        if not turn:
            self.beginnings.append(f"assistant\n{said}<|im_end|>")
        end = self.tokenizer.tokenizer.eos_token_id
        ids = [*self.tokenizer.tokenizer.encode(said), end]
        cut = params.max_tokens is not None and len(ids) > params.max_tokens
        ids = ids[: params.max_tokens]
        places = range(self.sampled, self.sampled + len(ids))
        self.sampled += len(ids)
        return Completion(
            token_ids=ids,
            logprobs=[-0.001 - 0.37 * (place % 11) for place in places],
            finish_reason="length" if cut else "stop",
            stop_reason=None if cut else end,
        )

    async def aclose(self) -> None:
        pass


class Talk(Environment):
    """Says "go on" until it has heard "end"; no reward for the first turn."""

    heard = 0

    def step(self, messages: Any, assistant: Message) -> Step:
        self.heard += 1
        done = "end" in str(assistant.content)
        reward = None if self.heard == 1 else 0.25 * self.heard
        said = [{"role": "user", "content": "go on"}]
        return Step(messages=said, done=done, reward=reward, metrics={"heard": self.heard})


async def rolled_out(
    script: Callable[[int, int], str],
    *,
    template: str = templates.APPENDS,
    n: int = 1,
    max_tokens: int = 60,
) -> EvaluationRow:
    """One row with n episodes."""
    row = EvaluationRow(messages=[Message(role="user", content="What is 7+1?")])
    row.input_metadata.row_id = "row"
    processor = EpisodeRolloutProcessor(
        Talk, sampler=Scripted(tokenizer(template), script), limits=EpisodeLimits(turns=6)
    )
    config = RolloutProcessorConfig(
        completion_params={"model": "any", "n": n, "max_tokens": max_tokens},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(1),
        server_script_path=None,
        steps=30,
    )
    (task,) = processor([row], config)
    try:
        rolled = await task
    finally:
        await processor.acleanup()
    assert rolled.execution_metadata.extra is not None
    rolled.execution_metadata.extra["rewards"] = [float(i == 0) for i in range(n)]
    return rolled


def rollout_file(folder: Path, row: EvaluationRow) -> Path:
    rows, path = folder / "rows.jsonl", folder / "rollouts.parquet"
    rows.write_text(row.model_dump_json() + "\n")
    convert(rows, path)
    return path


def page_of(path: Path, tokenizer: str | None = "local/arithmetic") -> Page:
    written = write_report(RolloutDataset(path), path.parent / "report.html", tokenizer=tokenizer)
    return Page(written.path.read_text(encoding="utf-8"))


def in_full(page: Page, group: Any, shown: Any) -> list[list[tuple[int, float | None]]]:
    """(id, logprob or None) of every token of every segment, the prompt above put in front."""
    segments = [
        [
            (page.tokens([number])[0][0], None if logprobs is None else -0.001 * logprobs[t])
            for part in parts
            for logprobs in [part.get("logprobs")]
            for t, number in enumerate(part["tokens"])
        ]
        for parts in shown["episode"]["segments"]
    ]
    (prompt,) = group["prompts"]
    return [[*((token, None) for token, *_ in page.tokens(prompt)), *segments[0]], *segments[1:]]


def recorded(extra: dict[str, Any], i: int) -> list[list[tuple[int, Any]]]:
    """The same from the record of the row, which never was in a file."""
    return [
        [
            (token, pytest.approx(logprob, abs=5.1e-4) if sampled else None)
            for token, logprob, sampled in zip(
                segment["tokens"], segment["logprobs"], segment["loss_mask"], strict=True
            )
        ]
        for segment in extra["trajectories"][i]
    ]


def texts(page: Page, part: dict[str, Any]) -> str:
    return "".join(text for _, text, _ in page.tokens(part["tokens"]))


async def test_every_token_of_every_turn_is_shown_in_its_place(tmp_path: Path) -> None:
    row = await rolled_out(lambda e, t: f"é{e}{t}" if t < 2 - e else "the end", n=2)
    extra = row.execution_metadata.extra
    assert extra is not None
    page = page_of(rollout_file(tmp_path, row))
    group = page.packed("group-0")
    for i, shown in enumerate(group["completions"]):
        assert in_full(page, group, shown) == recorded(extra, i)
        assert "tokens" not in shown
        assert "logprobs" not in shown
        assert shown["finish_reason"] == "stop"
        assert shown["episode"]["stop_reason"] == "done"
    second, first = sorted(
        (shown["episode"] for shown in group["completions"]), key=lambda episode: episode["turns"]
    )
    assert (first["turns"], second["turns"]) == (3, 2)
    (parts,) = first["segments"]
    assert [(part.get("turn"), part.get("reward")) for part in parts] == [
        (1, None), (None, None), (2, 0.5), (None, None), (3, 0.75),
    ]  # fmt: skip
    between = "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    assert [texts(page, part) for part in parts] == [
        "é00<|im_end|>", between, "é01<|im_end|>", between, "the end<|im_end|>",
    ]  # fmt: skip
    assert json.loads(first["metrics"]) == {"heard": 3}


async def test_a_rewritten_history_begins_a_new_segment(tmp_path: Path) -> None:
    row = await rolled_out(
        lambda e, t: f"{THOUGHT}8" if t == 0 else "the end", template=templates.STRIPS_THINKING
    )
    extra = row.execution_metadata.extra
    assert extra is not None
    page = page_of(rollout_file(tmp_path, row))
    group = page.packed("group-0")
    [shown] = group["completions"]
    assert in_full(page, group, shown) == recorded(extra, 0)
    first, second = shown["episode"]["segments"]
    assert [(part.get("turn"), texts(page, part)) for part in first] == [
        (1, f"{THOUGHT}8<|im_end|>")
    ]
    assert [(part.get("turn"), texts(page, part)) for part in second] == [
        (
            None,
            "<|im_start|>user\nWhat is 7+1?<|im_end|>\n<|im_start|>assistant\n8<|im_end|>\n"
            "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n",
        ),
        (2, "the end<|im_end|>"),
    ]
    [rewrite] = shown["episode"]["rewrites"]
    assert THOUGHT in rewrite["kept"]
    assert "assistant\n8<|im_end|>" in rewrite["rendered"]
    assert json.loads(shown["episode"]["metrics"]) == {"heard": 2}


async def test_numbers_are_of_all_turns_and_cut_off_is_who_was_so_in_the_last(
    tmp_path: Path,
) -> None:
    row = await rolled_out(lambda e, t: "7" * 30 if e and t else str(8 + e), n=2, max_tokens=20)
    page = page_of(rollout_file(tmp_path, row))
    # A turn of one digit has its end as a second token; six turns at most.
    sampled = [6 * 2, 2 + 20]
    whole, cut = sorted(
        page.packed("group-0")["completions"], key=lambda shown: shown.get("truncated", False)
    )
    assert (whole["episode"]["stop_reason"], cut["episode"]["stop_reason"]) == ("turns", "length")
    assert ("truncated" in whole, cut["truncated"]) == (False, True)
    assert (whole["finish_reason"], cut["finish_reason"]) == ("stop", "length")
    assert ("sampled tokens", str(sum(sampled))) in page.facts
    assert ("truncated", "1") in page.facts
    [line] = page.index["groups"]
    assert (line["truncated"], line["mean_length"]) == (1, sum(sampled) / 2)
    assert line["prompt"] == "What is 7+1?"
    assert "Episodes of several turns among the completions: 2." in page.words


def test_the_page_names_the_environment_and_how_long_an_episode_might_get(tmp_path: Path) -> None:
    settings = EpisodeSettings(
        environment="shop:Checkout",
        on_rewrite="reject",
        limits=asdict(EpisodeLimits(turns=6, step_seconds=2.5)),
    )
    _, page = report(tmp_path, [completion(0, 0)], metadata(episodes=settings))
    assert page.facts[3:6] == [
        ("Environment", "shop:Checkout"),
        (
            "Limits of an episode",
            "turns 6, tokens 32,768, seconds 1,800, step seconds 2.5, observation characters "
            "1,000,000",
        ),
        ("Rewritten history", "reject"),
    ]


async def test_without_a_tokenizer_the_conversation_is_shown(tmp_path: Path) -> None:
    row = await rolled_out(lambda e, t: "8" if t == 0 else "the end")
    page = page_of(rollout_file(tmp_path, row), tokenizer="no/such-tokenizer")
    group = page.packed("group-0")
    [shown] = group["completions"]
    said = "assistant: 8\n\nuser: go on\n\nassistant: the end"
    assert shown["episode"]["conversation"] == said
    assert "response" not in shown
    assert group["prompt_text"] == "user: What is 7+1?"


async def test_raw_logprobs_of_the_first_turn_stay_with_it(tmp_path: Path) -> None:
    row = await rolled_out(lambda e, t: "8" if t == 0 else "the end")
    extra = row.execution_metadata.extra
    assert extra is not None
    extra["raw_logprobs"] = [[-1.5, -2.5]]
    page = page_of(rollout_file(tmp_path, row))
    [shown] = page.packed("group-0")["completions"]
    assert "raw_logprobs" not in shown
    first, _, second = shown["episode"]["segments"][0]
    assert first["raw_logprobs"] == [1500, 2500]
    assert "raw_logprobs" not in second


async def test_turns_that_cannot_be_told_apart_have_no_numbers(tmp_path: Path) -> None:
    row = await rolled_out(lambda e, t: "8" if t == 0 else "the end")
    extra = row.execution_metadata.extra
    assert extra is not None
    extra["episodes"][0]["turns"] = 3
    page = page_of(rollout_file(tmp_path, row))
    [shown] = page.packed("group-0")["completions"]
    assert all("turn" not in part for part in shown["episode"]["segments"][0])
    assert shown["episode"]["turns"] == 3


def as_version_1(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same in a file of version 1, which has episodes in `evaluation_row`, but for a change."""
    rows = list(RolloutDataset(path))
    for row in rows:
        kept = json.loads(row.evaluation_row or "")
        extra = kept["execution_metadata"]["extra"]
        assert not {"trajectories", "episodes", "token_turn_traces"} & extra.keys()
        extra["trajectories"] = {str(r.sample_idx): list(map(as_lists, r.segments)) for r in rows}
        extra["episodes"] = {str(r.sample_idx): r.episode for r in rows}
        change(extra)
        row.evaluation_row = json.dumps(kept)
        row.finish_reason = row.first_finish_reason
    folder = path.parent / "version 1"
    folder.mkdir()
    about = RolloutDataset(path).metadata
    return dataset(folder, rows, msgspec.structs.replace(about, schema_version=1)).path


def with_segments(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """The same file but for the segments of the second completion."""
    rows = list(RolloutDataset(path))
    segments = [{k: list(v) for k, v in segment.items()} for segment in rows[1].segments or ()]
    change(segments)
    types = {"tokens": np.int32, "logprobs": np.float32, "loss_mask": np.int8}
    rows[1].segments = [{k: np.array(v, types[k]) for k, v in s.items()} for s in segments]
    write_rows(path, RolloutDataset(path).schema, rows)
    return path


BROKEN = [
    (lambda s: s[0]["logprobs"].pop(), r": segment 0: \d+ tokens, \d+ logprobs"),
    (lambda s: s[1]["loss_mask"].__setitem__(-1, 2), r": segment 1: loss_mask\[\d+\] is 2"),
    (lambda s: s[0]["tokens"].__setitem__(2, 9), r": segment 0: tokens\[2\] is 9, and"),
    (lambda s: s.clear(), ": 0 segments for 2 turns"),
]


async def two_segments(tmp_path: Path) -> Path:
    """Of two episodes."""
    row = await rolled_out(
        lambda e, t: f"{THOUGHT}8" if t == 0 else "the end",
        template=templates.STRIPS_THINKING,
        n=2,
    )
    return rollout_file(tmp_path, row)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *BROKEN,
        (lambda s: s[1]["tokens"].__setitem__(3, "x"), r": segment 1: tokens: .* integer"),
        (lambda s: s[1]["tokens"].__setitem__(3, 2**40), r": segment 1: .*\[3\] is 1099511627776"),
    ],
)
async def test_an_episode_that_breaks_the_record_is_named_by_row_completion_and_segment(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    path = await two_segments(tmp_path)
    broken = as_version_1(path, lambda extra: change(extra["trajectories"]["1"]))
    with pytest.raises(ReportError, match=rf"row 0 \('row'\), completion 1{words}"):
        page_of(broken)


@pytest.mark.parametrize(("change", "words"), BROKEN)
async def test_so_is_one_in_columns_and_it_is_not_converted(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    broken = with_segments(await two_segments(tmp_path), change)
    with pytest.raises(ReportError, match=rf"row 0 \('row'\), completion 1{words}"):
        page_of(broken)
    with pytest.raises(FormatError, match=rf"data row 0, completion 1{words}"):
        convert(broken, tmp_path / "again.parquet")


@pytest.mark.parametrize("key", ["trajectories", "episodes"])
async def test_an_episode_of_which_half_is_missing_is_named(tmp_path: Path, key: str) -> None:
    row = await rolled_out(lambda e, t: "8" if t == 0 else "the end", n=2)
    broken = as_version_1(rollout_file(tmp_path, row), lambda extra: extra[key].pop("1"))
    with pytest.raises(FormatError, match=rf"completion 1: evaluation_row has no {key} of it"):
        page_of(broken)
