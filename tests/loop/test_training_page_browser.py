"""A run's page in a real browser: it draws, tells values, and asks no network for anything."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.report._training_page import training_page

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

CHROMIUM = os.environ.get("EP_RFT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (or EP_RFT_CHROMIUM)"),
]


def lines() -> list[dict[str, Any]]:
    """Steps 1 to 20, the reward of step 11 missing; evaluations at 0, 10 and 20."""
    steps = [
        {
            "kind": "step",
            "step": n,
            **({} if n == 11 else {"reward_mean": n / 20}),
            "sampler_kl_k3": 10.0 ** (-n / 5),
            "dropped": {"zero_variance": n, "truncated": 2},
            "staleness": {"0": 3, "1": 1},
            "seconds": {"sampling": 1.0, "train": 3.0},
        }
        for n in range(1, 21)
    ]
    evaluations = [
        {"kind": "eval", "step": n, "greedy_score": n / 40, "sampled_score": n / 80}
        for n in (0, 10, 20)
    ]
    return [*steps, *evaluations]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "report.html"
    path.write_text(training_page(lines(), {"evaluator": "test_sums", "steps": 20}))
    return path


@contextlib.contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """The page; whatever it asks for or complains of that is not its own fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    assert wrong.pop(0) == f"request: {file.as_uri()}"
    yield page
    context.close()
    assert wrong == []


def marked(page: Any) -> list[bool]:
    """For each chart, whether a step is marked in it."""
    lines = page.locator("line.cursor")
    return lines.evaluate_all("all => all.map(one => one.style.display !== 'none')")


def test_the_pointer_is_told_the_values_of_its_step(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        chart = page.locator('svg[data-chart="held-out"]')
        chart.hover()
        note = page.locator("#note")
        assert note.text_content() == "step 10\nsampled: 0.125\ngreedy: 0.25"
        assert marked(page) == [True] * page.locator("svg[data-chart]").count()
        page.mouse.move(2, 2)
        assert note.is_hidden()
        assert not any(marked(page))


def test_arrow_keys_go_through_the_steps_and_over_the_gap(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.locator('svg[data-chart="reward"]').focus()
        note = page.locator("#note")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        assert note.text_content() == "step 10\nall scored completions: 0.5"
        page.keyboard.press("ArrowRight")
        assert note.text_content().startswith("step 12")
        page.keyboard.press("Escape")
        assert note.is_hidden()


def test_charts_are_drawn_inside_their_frames_without_scripts(browser: Any, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as page:
        for chart in ("reward", "held-out", "kl", "dropped", "time"):
            box = page.locator(f'svg[data-chart="{chart}"]').bounding_box()
            drawn = page.locator(f'svg[data-chart="{chart}"] path')
            assert drawn.count() >= 1
            for i in range(drawn.count()):
                inner = drawn.nth(i).bounding_box()
                assert inner["width"] > box["width"] / 3
                assert inner["x"] >= box["x"]
                assert inner["y"] >= box["y"] - 1
                assert inner["y"] + inner["height"] <= box["y"] + box["height"]
        assert page.locator('svg [id^="staleness-bar-"]').count() == 2


@pytest.mark.parametrize("width", [360, 1200])
def test_no_screen_has_to_scroll_sideways(browser: Any, file: Path, width: int) -> None:
    with opened(browser, file) as page:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_is_light_and_has_the_charts(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="dark") as page:
        dark = page.evaluate("getComputedStyle(document.body).getPropertyValue('--c0')")
        page.emulate_media(media="print", color_scheme="dark")
        light = page.evaluate("getComputedStyle(document.body).getPropertyValue('--c0')")
        assert dark != light
        assert page.locator('svg[data-chart="reward"]').is_visible()
        assert page.get_by_text("All settings").is_hidden()
