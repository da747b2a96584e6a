"""The page in a real browser: it draws, sorts, filters and opens, and model output stays text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.data._format import CompletionRow, RewardSettings
from eval_protocol_rft.record import Score
from eval_protocol_rft.report._page import write_report
from tests.report_page_rows import END, HOSTILE, completion, dataset, failed, metadata

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

CHROMIUM = os.environ.get("EP_RFT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (or EP_RFT_CHROMIUM)"),
]

HIDDEN = {"\x00": "⟨U+0000⟩", "\x1b": "⟨U+001B⟩", "\u202e": "⟨U+202E⟩", "\U000e0041": "⟨U+E0041⟩"}
UNSEEN = f"a{''.join(HIDDEN)}b"
ARABIC = "سلام"


def style(reward: float | None) -> dict[str, Any]:
    return {"reward_style": Score(reward=reward)}


def two(reward: float, other: float) -> dict[str, Any]:
    return {"scores": {"reward": Score(reward=reward, reason=HOSTILE), **style(other)}}


def rollouts() -> list[CompletionRow]:
    """Prompts: all passed, none passed, mixed, one failed, one unscored, truncated, all failed."""
    return [
        completion(0, 0, HOSTILE, **two(1.0, 0.1)),
        completion(0, 1, UNSEEN, **two(1.0, 0.1)),
        completion(1, 0, "é😀 日本", **two(0.0, 0.9), logprobs=[-0.6 * t for t in range(14)]),
        completion(1, 1, f"two\nlines\t{ARABIC}", **two(0.0, 0.8)),
        completion(2, 0, "777", **two(1.0, 0.3), raw_logprobs=np.full(4, -1.5, np.float32)),
        completion(2, 1, "7", **two(0.0, 0.3)),
        completion(2, 2, "77", **two(0.0, 0.3)),
        failed(3, 0, HOSTILE),
        completion(3, 1, **two(0.0, 0.5)),
        completion(4, 0, scores={}),
        completion(4, 1, **two(1.0, 0.6)),
        completion(5, 0, "7" * 40, truncated=True, **two(0.5, 0.2)),
        failed(6, 0),
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rewards = {
        name: RewardSettings(evaluator=f"checks.py::{name}", fingerprint="a" * 64)
        for name in ("reward", "reward_style")
    }
    rows = dataset(folder, rollouts(), metadata(rewards=rewards))
    return write_report(rows, folder / "report.html").path


@contextlib.contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """The page; whatever it asks for, complains of or runs that is not its own fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    assert wrong.pop(0) == f"request: {file.as_uri()}"
    yield page
    if options.get("java_script_enabled", True):
        assert page.evaluate("typeof pwned") == "undefined"
    context.close()
    assert wrong == []


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    with opened(browser, file) as running:
        yield running


def order(page: Any) -> list[int]:
    """Prompts in the table, from the top."""
    return [
        int(n)
        for n in page.locator("tr.line").evaluate_all("rows => rows.map(r => r.dataset.group)")
    ]


def open_group(page: Any, position: int) -> Any:
    page.locator(f'tr[data-group="{position}"] button').click()
    detail = page.locator(f'tr[data-group="{position}"] + tr.detail')
    detail.locator(".completion").first.wait_for()
    return detail


def heading(page: Any, title: str) -> Any:
    return page.locator("#prompts thead th", has_text=title)


def test_bars_are_drawn_as_high_as_their_counts(page: Any) -> None:
    bars = page.locator('svg [id^="rewards-0-bar-"]')
    labels = [bars.nth(i).locator("title").text_content() for i in range(bars.count())]
    assert labels == ["0: 5", "0.5: 1", "1: 4"]
    heights = [bars.nth(i).locator("path").bounding_box()["height"] for i in range(3)]
    assert heights[1] > 5
    np.testing.assert_allclose(heights, np.array([5, 1, 4]) * heights[1], rtol=0.02)
    assert page.locator('svg [id^="lengths-marked-"]').count() == 1
    assert page.locator('svg[aria-labelledby="pass-0-title"] circle').count() == 3


@pytest.mark.parametrize("how", ["pointer", "keyboard"])
def test_a_heading_sorts_the_table_and_sorts_it_back(page: Any, how: str) -> None:
    def press(title: str) -> None:
        button = heading(page, title).locator("button")
        if how == "pointer":
            button.click()
        else:
            button.focus()
            page.keyboard.press("Enter")

    assert order(page) == [0, 1, 2, 3, 4, 5, 6]
    assert heading(page, "#").get_attribute("aria-sort") == "ascending"
    press("Mean reward")
    # Means 1, 0, 1/3, 0, 1, 1/2 and none: that one is last either way. Equals stay in file order.
    assert order(page) == [1, 3, 2, 5, 0, 4, 6]
    assert heading(page, "Mean reward").get_attribute("aria-sort") == "ascending"
    assert heading(page, "#").get_attribute("aria-sort") == "none"
    press("Mean reward")
    assert order(page) == [0, 4, 5, 2, 1, 3, 6]
    assert heading(page, "Mean reward").get_attribute("aria-sort") == "descending"
    press("Completions")
    assert order(page) == [5, 6, 0, 1, 3, 4, 2]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("all passed", [0, 4]),
        ("none passed", [1, 3, 5]),
        ("mixed", [2]),
        ("truncated", [5]),
        ("failed", [3, 6]),
        ("unscored", [4]),
    ],
)
def test_filters_show_the_prompts_they_name(page: Any, label: str, expected: list[int]) -> None:
    page.get_by_role("radio", name=label, exact=True).check()
    assert order(page) == expected
    says = "7 prompts" if len(expected) == 7 else f"{len(expected)} of 7 prompts"
    assert page.locator("#count").text_content() == says


def test_the_box_finds_prompts_by_their_start_and_id(page: Any) -> None:
    page.get_by_label("Find").fill("WHAT IS 2")
    assert order(page) == [2]
    page.get_by_label("Find").fill("row-4")
    assert order(page) == [4]
    page.get_by_role("radio", name="failed", exact=True).check()
    assert order(page) == []
    page.get_by_label("Find").fill("")
    assert order(page) == [3, 6]


def test_an_opened_group_stays_open_where_the_table_is_sorted_anew(page: Any) -> None:
    detail = open_group(page, 2)
    heading(page, "Mean reward").locator("button").click()
    assert detail.locator(".completion").count() == 3
    assert order(page) == [1, 3, 2, 5, 0, 4, 6]
    page.locator('tr[data-group="2"] button').click()
    assert page.locator("tr.detail").count() == 0


def test_hostile_output_is_text_and_nothing_else(page: Any) -> None:
    first = open_group(page, 0).locator(".completion").nth(0)
    assert first.locator(".tokens").text_content() == HOSTILE + "<|im_end|>"
    assert first.locator(".reason").first.text_content() == HOSTILE
    failure = open_group(page, 3).locator(".completion.failed .plain")
    assert failure.text_content() == HOSTILE
    assert page.locator("img, iframe, script[src]").count() == 0


def test_hidden_characters_are_shown_by_their_numbers(page: Any) -> None:
    second = open_group(page, 0).locator(".completion").nth(1)
    marks = "".join(HIDDEN.values())
    # Each byte of a character is a token here: those before its last one are dots.
    assert second.locator(".tokens").text_content().replace("·", "") == f"a{marks}b<|im_end|>"


def backgrounds(tokens: Any) -> list[str]:
    return tokens.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")


def test_tokens_are_shaded_by_their_logprob_and_prompts_are_not(page: Any) -> None:
    detail = open_group(page, 1)
    tokens = detail.locator(".completion").nth(0).locator(".tokens > .token")
    assert tokens.count() == 14
    alphas = [float(colour.strip("rgba()").split(",")[3]) for colour in backgrounds(tokens)]
    # The t-th one has logprob -0.6 t.
    assert alphas == sorted(alphas)
    assert alphas[0] < 0.05
    assert alphas[-1] > 0.7
    assert len(set(alphas)) == 6
    prompt = detail.locator(".part.prompt .token")
    assert prompt.count() > 5
    assert set(backgrounds(prompt)) == {"rgba(0, 0, 0, 0)"}
    assert "not trained on" in detail.locator(".part.prompt h3").text_content()


def test_a_token_tells_its_id_and_logprobs_to_pointer_and_keyboard(page: Any) -> None:
    tokens = open_group(page, 2).locator(".completion").nth(0).locator(".tokens")
    note = page.locator("#note")
    tokens.locator(".token").nth(1).hover()
    seven = completion(2, 0).completion_ids[0]
    assert note.text_content() == (
        f"token 2 of 4, id {seven}\nlogprob -0.250 (probability 77.9%)\nraw logprob -1.500"
    )
    tokens.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert note.text_content().startswith(f"token 4 of 4, id {END}\ncontrol token\nlogprob -0.750")
    page.keyboard.press("Escape")
    assert note.is_hidden()


def test_a_truncated_completion_says_so(page: Any) -> None:
    cut = open_group(page, 5).locator(".completion")
    assert "truncated" in cut.locator("header").text_content()
    assert "cut off" in cut.locator(".cut").text_content()


def episode(turns: int) -> CompletionRow:
    """Of two segments, of which the second has all turns but the first."""
    row = completion(0, 0, HOSTILE)
    prompt, first = row.prompt_ids.tolist(), row.completion_ids.tolist()
    turn = [0] * 2 + [1] * 3
    segments = [
        {
            "tokens": [*prompt, *first],
            "logprobs": [*[0.0] * len(prompt), *row.logprobs.tolist()],
            "loss_mask": [*[0] * len(prompt), *[1] * len(first)],
        },
        {
            "tokens": [20] * 5 * (turns - 1),
            "logprobs": [-6.0 * one for one in turn] * (turns - 1),
            "loss_mask": turn * (turns - 1),
        },
    ]
    about = {"turns": turns, "stop_reason": "length", "step_rewards": [None, 0.5]}
    kept = {"trajectories": {"0": segments}, "episodes": {"0": about}}
    row.evaluation_row = json.dumps({"execution_metadata": {"extra": kept}})
    return row


def test_an_episode_shows_its_turns_and_where_history_was_rewritten(
    browser: Any, tmp_path: Path
) -> None:
    file = write_report(dataset(tmp_path, [episode(3)]), tmp_path / "report.html").path
    with opened(browser, file) as page:
        shown = open_group(page, 0).locator(".completion")
        facts = shown.locator(".facts-line").text_content()
        first = len(completion(0, 0, HOSTILE).completion_ids)
        assert facts.startswith(
            f"3 turns · stop reason length · 2 segments · {first + 6} sampled tokens · "
        )
        assert "finish reason of the last turn length" in facts
        assert "truncated" in shown.locator("header").text_content()
        assert shown.locator(".episode h4, .episode .segment-start").all_text_contents() == [
            f"Turn 1 · {first} tokens",
            "history rewritten by the chat template: new segment",
            "Turn 2 · step reward 0.5 · 3 tokens",
            "Turn 3 · 3 tokens",
        ]
        turns, between = shown.locator(".turn .tokens"), shown.locator(".between .tokens")
        assert turns.first.text_content() == HOSTILE + "<|im_end|>"
        assert set(backgrounds(between.locator(".token"))) == {"rgba(0, 0, 0, 0)"}
        assert "rgba(0, 0, 0, 0)" not in backgrounds(turns.locator(".token"))
        turns.nth(1).locator(".token").first.hover()
        assert "logprob -6.000" in page.locator("#note").text_content()


def test_a_long_episode_is_drawn_in_parts(browser: Any, tmp_path: Path) -> None:
    file = write_report(dataset(tmp_path, [episode(1000)]), tmp_path / "report.html").path
    with opened(browser, file) as page:
        shown = open_group(page, 0).locator(".completion")
        assert 500 < shown.locator(".turn").count() < 700
        shown.get_by_role("button", name="turns left").click()
        assert shown.locator(".turn").count() == 1000
        assert shown.get_by_role("button", name="turns left").is_hidden()


def test_another_reward_column_changes_charts_table_and_opened_groups(page: Any) -> None:
    detail = open_group(page, 1)
    assert detail.locator(".badge").first.text_content() == "reward 0"
    page.get_by_role("radio", name="reward_style", exact=True).check()
    assert page.locator('svg[aria-labelledby="rewards-0-title"]').is_hidden()
    assert page.locator('svg[aria-labelledby="rewards-1-title"]').is_visible()
    detail.get_by_text("reward 0.9", exact=True).wait_for()
    heading(page, "Mean reward").locator("button").click()
    assert order(page) == [0, 5, 2, 3, 4, 1, 6]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_paper(browser: Any, file: Path, scheme: str) -> None:
    with opened(browser, file, color_scheme=scheme) as page:
        style = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])"
            "(getComputedStyle(document.body))"
        )
        ink, paper = (np.array([int(n) for n in re.findall(r"\d+", colour)]) for colour in style)
        assert (ink.sum() < paper.sum()) == (scheme == "light")
        assert contrast(ink, paper) > 7


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """WCAG 2.1 contrast ratio of two sRGB colours."""

    def luminance(colour: np.ndarray) -> float:
        c = colour / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_print_has_charts_table_and_opened_groups_and_no_controls(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="dark") as page:
        detail = open_group(page, 2)
        page.emulate_media(media="print", color_scheme="dark")
        assert page.locator('svg[aria-labelledby="rewards-0-title"]').is_visible()
        assert detail.locator(".completion").nth(2).is_visible()
        assert page.locator("#tools").is_hidden()
        paper = page.evaluate(
            "getComputedStyle(document.documentElement).getPropertyValue('--paper')"
        )
        assert paper.strip() == "#fdfdfc"  # light, whatever the screen


def test_a_narrow_screen_scrolls_the_table_and_not_the_page(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    open_group(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_the_numbers_and_charts_are_there(browser: Any, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as page:
        assert page.locator('svg [id^="rewards-0-bar-"]').count() == 3
        assert page.get_by_text("needs JavaScript").is_visible()
    with opened(browser, file) as page:
        assert page.get_by_text("needs JavaScript").is_hidden()


def test_what_is_long_is_drawn_in_parts(browser: Any, tmp_path: Path) -> None:
    rows = [completion(0, k, "7" * (7000 if k == 0 else 1)) for k in range(40)]
    rows += [completion(i, 0) for i in range(1, 251)]
    long = write_report(dataset(tmp_path, rows), tmp_path / "report.html").path
    with opened(browser, long) as page:
        assert len(order(page)) == 200
        page.get_by_role("button", name="Show 51 of 51 more prompts").click()
        assert order(page) == list(range(251))
        detail = open_group(page, 0)
        first = detail.locator(".completion").first
        assert first.locator(".token").count() == 3000
        first.get_by_role("button", name="Show 3000 of 4001 more tokens").click()
        first.get_by_role("button", name="Show 1001 of 1001 more tokens").click()
        assert first.locator(".tokens").text_content() == "7" * 7000 + "<|im_end|>"
        detail.get_by_role("button", name="Show 8 of 8 more completions").click()
        assert detail.locator(".completion").count() == 40
