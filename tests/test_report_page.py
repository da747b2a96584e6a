"""The page is one inert file that holds every completion exactly, and says what it leaves out."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._format import CompletionRow, RewardSettings, SamplingSettings
from eval_protocol_rft.record import Score
from eval_protocol_rft.report._html import ReportError, embedded_json, visible
from eval_protocol_rft.report._page import ReportTotals, write_report
from eval_protocol_rft.report._page_detail import prompt_start
from tests.data.servers import ep_rft
from tests.report_page_rows import (
    END,
    HOSTILE,
    UNSEEN,
    completion,
    dataset,
    encode,
    failed,
    metadata,
    report,
)

TWO_REWARDS = {
    "reward": RewardSettings(evaluator="checks.py::exact", fingerprint="a" * 64),
    "reward_style": RewardSettings(evaluator="checks.py::style", fingerprint="b" * 64),
}


def test_every_completion_is_in_the_page_token_by_token(tmp_path: Path) -> None:
    texts = ["7", "café 😀", HOSTILE, UNSEEN, "", "two\nlines\t"]
    rows = [
        completion(i, k, text, truncated=k == 1, raw_logprobs=None)
        for i, pair in enumerate(zip(texts[::2], texts[1::2], strict=True))
        for k, text in enumerate(pair)
    ]
    _, page = report(tmp_path, rows)
    for i in range(3):
        group = page.packed(f"group-{i}")
        [prompt] = group["prompts"]
        assert [token for token, *_ in page.tokens(prompt)] == rows[2 * i].prompt_ids.tolist()
        for k, shown in enumerate(group["completions"]):
            row = rows[2 * i + k]
            tokens = page.tokens(shown["tokens"])
            assert [token for token, *_ in tokens] == row.completion_ids.tolist()
            ending = "" if row.truncated else "<|im_end|>"
            assert "".join(text for _, text, _ in tokens) == row.response + ending
            assert tokens[-1][2] == ("text" if row.truncated else "control")
            np.testing.assert_allclose(
                -0.001 * np.array(shown["logprobs"]), row.logprobs, atol=5e-4
            )
            assert shown.get("truncated", False) is row.truncated
            assert shown["scores"] == [{"column": "reward", "reward": 1.0, "reason": "as it is"}]
            assert "response" not in shown  # the tokens show it


def test_the_head_says_where_the_rollouts_come_from(tmp_path: Path) -> None:
    rows = [completion(0, k, "7" * (k + 1), reward=float(k == 0)) for k in range(3)]
    _, page = report(tmp_path, [*rows, failed(0, 3)])
    assert page.facts == [
        ("Model", "local/arithmetic"),
        ("Tokenizer", "local/arithmetic"),
        ("Sampling", "temperature 1, top_p 1, top_k off, max_tokens 64, n 4"),
        ("prompts", "1"),
        ("completions", "4"),
        ("failed", "1"),
        ("truncated", "0"),
        ("sampled tokens", "9"),
        ("mean reward", "0.333"),
        ("pass@1", "0.333"),
        ("pass@2", "0.667"),
        ("pass@3", "1.000"),
        ("unscored", "0"),
    ]


@st.composite
def groups(draw: st.DrawFn) -> list[list[CompletionRow]]:
    rewards = st.none() | st.sampled_from([0.0, 0.5, 1.0])
    shapes = draw(st.lists(st.lists(st.none() | st.tuples(rewards), min_size=1, max_size=5)))
    return [
        [
            failed(i, k) if one is None else completion(i, k, reward=one[0])
            for k, one in enumerate(shape)
        ]
        for i, shape in enumerate(shapes)
    ]


@given(groups())
def test_sums_count_failed_and_unscored_apart_and_pass_at_k_is_over_all_draws(
    data: list[list[CompletionRow]],
) -> None:
    totals = ReportTotals(["reward"], pass_threshold=0.5)
    for group in data:
        totals.add(group)
    rows = [row for group in data for row in group]
    rewards = [row.reward for row in rows if row.reward is not None]
    column = totals.columns["reward"]
    assert (totals.prompts, totals.completions) == (len(data), len(rows))
    assert totals.failed == sum(row.failed for row in rows)
    assert totals.unscored("reward") == sum(not row.failed and row.reward is None for row in rows)
    assert column.mean == (pytest.approx(sum(rewards) / len(rewards)) if rewards else None)
    scored = [[row.reward for row in group if row.reward is not None] for group in data]
    points = column.pass_curve()
    assert [point.k for point in points] == list(range(1, max(map(len, scored), default=0) + 1))
    for point in points:
        # By definition: the share of draws of k scored completions that hold a passed one.
        shares = [
            np.mean([max(draw) >= 0.5 for draw in itertools.combinations(group, point.k)])
            for group in scored
            if len(group) >= point.k
        ]
        assert point.value == pytest.approx(np.mean(shares))
        assert point.groups == len(shares)


def test_the_table_has_a_line_per_prompt(tmp_path: Path) -> None:
    rows = [
        completion(0, 0, "7", 1.0),
        completion(0, 1, "77", 0.0, truncated=True),
        completion(0, 2, "777", None),
        failed(0, 3),
        failed(1, 0),
    ]
    _, page = report(tmp_path, rows)
    assert page.index["columns"] == ["reward"]
    assert page.index["groups"] == [
        {
            "data_idx": 0,
            "row_id": "row-0",
            "prompt": "What is 0+0?",
            "size": 4,
            "failed": 1,
            "truncated": 1,
            "mean_length": pytest.approx((2 + 2 + 4) / 3),
            "columns": [{"scored": 2, "passed": 1, "mean": 0.5}],
        },
        {
            "data_idx": 1,
            "row_id": "row-1",
            "prompt": "What is 1+0?",
            "size": 1,
            "failed": 1,
            "truncated": 0,
            "mean_length": None,
            "columns": [{"scored": 0, "passed": 0, "mean": None}],
        },
    ]
    failure = page.packed("group-0")["completions"][3]["failure"]
    assert failure == {
        "message": "HTTP 503: overloaded",
        "kind": "unavailable",
        "status": 503,
        "attempts": 5,
    }


def test_each_reward_column_has_its_own_figures_and_a_switch(tmp_path: Path) -> None:
    rows = [
        completion(
            0,
            k,
            scores={
                "reward": Score(reward=float(k == 0)),
                "reward_style": Score(reward=0.25, metrics={"words": {"score": 3}}),
            },
        )
        for k in range(2)
    ]
    _, page = report(tmp_path, rows, metadata(rewards=TWO_REWARDS))
    assert page.index["columns"] == ["reward", "reward_style"]
    assert [line["mean"] for line in page.index["groups"][0]["columns"]] == [0.5, 0.25]
    assert "checks.py::exact" in page.words
    assert "checks.py::style" in page.words
    radios = [a for tag, a in page.tags if tag == "input" and a.get("name") == "column"]
    assert [radio["value"] for radio in radios] == ["0", "1"]
    [*_, style] = page.packed("group-0")["completions"][0]["scores"]
    assert json.loads(style["metrics"]) == {"words": {"score": 3}}


def test_statistics_are_of_all_prompts_where_texts_are_of_fewer(tmp_path: Path) -> None:
    rows = [completion(i, 0, reward=float(i >= 2)) for i in range(5)]
    written, page = report(tmp_path, rows, limit=2)
    assert (written.shown_prompts, written.prompts, written.completions) == (2, 5, 5)
    assert "The first 2 of 5 prompts are listed here; the numbers above are of all" in page.words
    assert ("mean reward", "0.600") in page.facts
    assert [group["data_idx"] for group in page.index["groups"]] == [0, 1]
    assert "group-1" in page.scripts
    assert "group-2" not in page.scripts


def test_without_a_limit_all_are_shown_and_nothing_is_said_of_it(tmp_path: Path) -> None:
    written, page = report(tmp_path, [completion(i, 0) for i in range(3)])
    assert written.shown_prompts == 3
    assert "are listed here" not in page.words


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (None, "does not say which tokenizer"),
        ("no/such-tokenizer", "cannot load tokenizer 'no/such-tokenizer'"),
    ],
)
def test_without_a_tokenizer_ids_and_stored_texts_are_shown(
    tmp_path: Path, recorded: str | None, words: str
) -> None:
    about = metadata()
    sampling = msgspec.structs.replace(about.sampling, tokenizer=recorded)
    written, page = report(tmp_path, [completion(0, 0, "7")], metadata(sampling=sampling))
    assert "Tokens are shown as ids, beside the stored text" in page.words
    assert words in page.words
    [problem] = written.problems
    assert words in problem
    group = page.packed("group-0")
    [shown] = group["completions"]
    assert page.tokens(shown["tokens"]) == [[*encode("7"), "", "bare"], [END, "", "bare"]]
    assert shown["response"] == "7"
    assert group["prompt_text"] == "What is 0+0?"


def test_the_user_can_name_the_tokenizer(tmp_path: Path) -> None:
    sampling = msgspec.structs.replace(metadata().sampling, tokenizer=None)
    written, page = report(
        tmp_path, [completion(0, 0)], metadata(sampling=sampling), tokenizer="local/arithmetic"
    )
    assert written.problems == ()
    [shown] = page.packed("group-0")["completions"]
    assert page.tokens(shown["tokens"])[-1] == [END, "<|im_end|>", "control"]


def test_rows_that_were_sampled_in_different_ways_say_so_themselves(tmp_path: Path) -> None:
    def sampled(model: str, tokenizer: str) -> str:
        sampling = {"model": model, "tokenizer": tokenizer, "temperature": 1.0}
        row = {"messages": [], "execution_metadata": {"extra": {"sampling": sampling}}}
        return json.dumps(row)

    rows = [
        completion(0, 0, evaluation_row=sampled("small", "local/arithmetic")),
        completion(1, 0, evaluation_row=sampled("large", "no/such-tokenizer")),
    ]
    written, page = report(tmp_path, rows, metadata(sampling=None))
    assert "small, large" in page.words
    assert len(written.problems) == 1
    kinds = [
        page.tokens(page.packed(f"group-{i}")["completions"][0]["tokens"])[-1][2] for i in (0, 1)
    ]
    assert kinds == ["control", "bare"]


def test_a_stored_text_that_is_not_the_tokens_text_is_shown_beside_it(tmp_path: Path) -> None:
    _, page = report(tmp_path, [completion(0, 0, "7", response="8"), completion(0, 1, "7")])
    first, second = page.packed("group-0")["completions"]
    assert first["response"] == "8"
    assert "response" not in second


def test_completions_that_continue_different_tokens_name_their_prompt(tmp_path: Path) -> None:
    other = np.array([1, 2, 3], np.int32)
    rows = [completion(0, 0), completion(0, 1, prompt_ids=other), completion(0, 2)]
    _, page = report(tmp_path, rows)
    group = page.packed("group-0")
    assert [shown["prompt"] for shown in group["completions"]] == [0, 1, 0]
    assert [token for token, *_ in page.tokens(group["prompts"][1])] == [1, 2, 3]


def test_a_reward_that_is_no_number_is_unscored_and_says_why(tmp_path: Path) -> None:
    rows = [completion(0, 0, reward=math.nan), completion(0, 1, reward=1.0)]
    _, page = report(tmp_path, rows)
    assert ("mean reward", "1.000") in page.facts
    assert ("unscored", "1") in page.facts
    [score] = page.packed("group-0")["completions"][0]["scores"]
    assert score["error"] == "the reward is nan, no finite number"
    assert "reward" not in score


def test_nothing_runs_or_loads_but_the_pages_own_script(tmp_path: Path) -> None:
    sampling = SamplingSettings(
        model=f"{HOSTILE}\u202e", tokenizer=None, temperature=1.0, top_p=1.0, top_k=0, n=1
    )
    rows = [
        completion(
            0,
            0,
            HOSTILE,
            prompt=HOSTILE,
            ground_truth=HOSTILE,
            scores={"reward": Score(reward=1.0, reason=HOSTILE, metrics={HOSTILE: HOSTILE})},
        ),
        failed(0, 1, HOSTILE),
    ]
    _, page = report(tmp_path, rows, metadata(sampling=sampling))
    assert set(page.scripts) == {"index", "vocabulary", "group-0", "module"}
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object", "base", "form"}
    assert not [a for _, a in page.tags if {"src", "href", "style", "srcset"} & set(a)]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "pwned" in page.text  # the model's name, as text
    assert "⟨U+202E⟩" in page.text
    assert "\u202e" not in page.html
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_the_policy_allows_that_script_and_that_style_alone(tmp_path: Path) -> None:
    _, page = report(tmp_path, [completion(0, 0)])
    [policy] = [
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]

    def sha(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "script-src": f"'sha256-{sha(page.scripts['module'])}'",
        "style-src": f"'sha256-{sha(page.style)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_scripts_never_parse_text_as_markup(tmp_path: Path) -> None:
    _, page = report(tmp_path, [completion(0, 0)])
    script = page.scripts["module"]
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\("
    assert re.findall(ways, script) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON | st.text(st.sampled_from("<>&/!-script\u2028\u2029\"'\\")))
def test_embedded_data_come_back_as_they_were_and_hold_no_markup(value: object) -> None:
    text = embedded_json(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_a_prompt_starts_with_the_users_last_message_on_one_line() -> None:
    messages = [
        {"role": "system", "content": "You are good at sums."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And\n 2+2?"},
    ]
    assert prompt_start(messages) == "And 2+2?"
    assert prompt_start(messages[:1]) == "You are good at sums."
    assert prompt_start([]) == ""
    assert prompt_start([{"role": "user"}]) == ""
    assert len(prompt_start("x" * 500)) == 200


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\nb é日😀") == "a\nb é日😀"
    assert visible(UNSEEN).isprintable()
    assert visible("\u202e") == "⟨U+202E⟩"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logprobs": np.array([-0.5], np.float32)}, "2 token ids but 1 logprobs"),
        ({"logprobs": np.array([-0.5, np.nan], np.float32)}, r"logprobs\[1\] is nan"),
        ({"raw_logprobs": np.array([0.5, -1], np.float32)}, r"raw_logprobs\[0\] is 0.5"),
        ({"completion_ids": np.array([7, -1], np.int32)}, r"token_ids\[1\] is -1"),
    ],
)
def test_inexact_token_data_are_named_by_row_and_completion(
    tmp_path: Path, fields: dict[str, np.ndarray], words: str
) -> None:
    (tmp_path / "report.html").write_text("the old page")
    given = {"completion_ids": [7, END], "logprobs": [-0.5, -0.5]}
    row = completion(3, 1, **{k: np.array(v) for k, v in given.items()} | fields)
    row.completion_ids = row.completion_ids.astype(np.int32)
    row.logprobs = row.logprobs.astype(np.float32)
    with pytest.raises(ReportError, match=rf"row 3 \('row-3'\), completion 1: {words}"):
        report(tmp_path, [completion(3, 0), row])
    assert (tmp_path / "report.html").read_text() == "the old page"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "rollouts.parquet"]


def test_the_rollout_file_is_never_overwritten(tmp_path: Path) -> None:
    rollouts = dataset(tmp_path, [completion(0, 0)])
    before = rollouts.path.read_bytes()
    with pytest.raises(ReportError, match="is the rollout file itself"):
        write_report(rollouts, rollouts.path)
    assert rollouts.path.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "no completions to report"),
        ([completion(0, 0)], {"pass_threshold": math.nan}, "must be finite"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path, rows: list[CompletionRow], options: dict[str, float], words: str
) -> None:
    with pytest.raises(ReportError, match=words):
        report(tmp_path, rows, **options)


def run(*arguments: str) -> tuple[int, str, str]:
    result = ep_rft("report", *arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_where_the_page_is(tmp_path: Path) -> None:
    path = dataset(tmp_path, [completion(i, 0) for i in range(3)]).path
    output = tmp_path / "page.html"
    code, out, err = run(str(path), "-o", str(output), "--limit", "2")
    assert (code, err) == (0, "")
    assert "Texts of the first 2 of 3 prompts are in the page" in out
    assert f"Report of 3 completions: {output} (" in out
    assert output.read_text().startswith("<!doctype html>")
    assert run(str(path))[0] == 0
    assert path.with_suffix(".html").is_file()


def test_the_command_ends_with_one_line_where_something_is_wrong(tmp_path: Path) -> None:
    path = dataset(tmp_path, [completion(0, 0)]).path
    for arguments, words in (
        ([str(tmp_path / "nothing.parquet")], "no such rollout file"),
        ([str(path), "-o", str(tmp_path / "no" / "page.html")], "cannot write"),
        ([str(path), "-o", str(path)], "is the rollout file itself"),
    ):
        code, _, err = run(*arguments)
        assert code == 1
        assert words in err
        assert err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_not_a_page_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset(tmp_path, [completion(0, 0)]).path

    def broken(self: RolloutDataset) -> Iterator[list[CompletionRow]]:
        yield from ()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RolloutDataset, "groups", broken)
    code, _, err = run(str(path))
    assert (code, err) == (1, f"ep-rft: {path} cannot be read: Input/output error\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").symlink_to("/proc/self/mem")  # its first byte cannot be read
    code, _, err = run(str(folder))
    assert code == 1
    assert err == f"ep-rft: {folder}/settings.json cannot be read: Input/output error\n"


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset(tmp_path, [completion(0, 0)]).path
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for what in (path, tmp_path / "run"):
        code, _, err = run(str(what))
        assert code == 1
        assert "pip install matplotlib" in err
        assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))
