"""Options are defined once: documentation, command line and Python say the same."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from eval_protocol_rft import data, doctor, loop, report, sampling, training
from eval_protocol_rft._options import check_options
from eval_protocol_rft.cli import COMMANDS, app
from eval_protocol_rft.cli._bulk_script import FLAGS
from eval_protocol_rft.local import Placement
from scripts.options_page import PAGE, page
from tests.data.servers import ep_rft

REPOSITORY = Path(__file__).parents[1]


class Click(NamedTuple):
    """A flag as the parser of the command line knows it."""

    names: list[str]
    default: Any


def flags(command: str) -> dict[str, Click]:
    """Its flags by their names in Python, from the parser that a call of it uses."""
    group = typer.main.get_command(app)
    context = group.make_context("ep-rft", [command], resilient_parsing=True)
    parser = group.resolve_command(context, [command])[1]
    return {
        flag.name: Click([*flag.opts, *flag.secondary_opts], flag.default)
        for flag in parser.params
        if flag.param_type_name == "option"
    }


FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "generate": (data.agenerate, sampling.SamplingParams, sampling.RetryPolicy, Placement),
    "serve": (Placement,),
    "score": (data.score,),
    "filter": (data.FilterRules, data.filter_rollouts),
    "buckets": (data.BucketRules, data.bucket_rollouts),
    "stats": (data.rollout_stats,),
    "report": (report.write_report,),
    "datums": (data.write_datums, training.BatchOptions, training.Filters),
    "convert": (data.convert, data.ExampleRules),
    "show": (report.rollout_table,),
    "doctor": (doctor.Setup, Placement),
    "train": (loop.atrain, loop.LoopOptions, loop.LocalParts, loop.Optimizer, Placement),
}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_command_line_has_the_defaults_of_python(command: str) -> None:
    found = flags(command)
    compared = 0
    for function in FUNCTIONS[command]:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in found and parameter.default is not inspect.Parameter.empty:
                compared += 1
                ours, theirs = found[name].default, parameter.default
                if "factory" in repr(theirs) or theirs == ():
                    theirs = None
                assert ours == theirs, name
    assert compared >= 2


def test_the_page_of_options_is_the_one_that_is_made_of_them() -> None:
    assert PAGE.read_text() == page(), "python -m scripts.options_page writes it anew"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_and_the_command_line_have_the_same_flags(command: str) -> None:
    section = PAGE.read_text().partition(f"## ep-rft {command}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:`-[^|]*?`(?:, )?)+)", section, flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(-[-\w]*)`", row)}
    typed = {name for flag in flags(command).values() for name in flag.names}
    assert listed == typed


def documents() -> list[Path]:
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_every_command_in_the_documentation_takes_its_flags(document: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", document.read_text())
    for command, rest in re.findall(r"ep-rft (\w+)\b([^\n`]*)", text):
        if command not in COMMANDS:
            continue
        known = {name for flag in flags(command).values() for name in flag.names} | {"--help"}
        known |= set(FLAGS) if command == "generate" else set()
        typed = set(
            re.findall(r"(?<=\s)(--?[a-z][-\w]*)", rest.partition(" | ")[0].partition("# ")[0])
        )
        assert typed <= known, f"ep-rft {command}{rest}"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: loop.LoopOptions(steps=0), "steps must be at least 1, got 0"),
        (lambda: loop.LoopOptions(epochs=0.0), "epochs must be above 0, got 0.0"),
        (lambda: loop.LoopOptions(steps=1, kl_beta=math.nan), "kl_beta must be finite"),
        (lambda: loop.LoopOptions(steps=1, schedule="x"), "one of constant, linear, cosine"),
        (lambda: loop.Optimizer(beta2=1.0), "beta2 must be below 1, got 1.0"),
        (lambda: data.FilterRules(min_tokens=0), "min_tokens must be at least 1, got 0"),
        (lambda: data.generate("a.jsonl", "b.parquet", {}, concurrency=0), "concurrency must be"),
        (lambda: data.generate("a.jsonl", "b.parquet", {}, limit=0), "limit must be at least 1"),
        (lambda: data.score("a.parquet", "a:b", workers=0), "workers must be at least 1, got 0"),
        (lambda: data.score("a.parquet", "a:b", timeout=-1.0), "timeout must be at least 0"),
        (lambda: data.rollout_stats("a.parquet", pass_threshold=math.inf), "must be finite"),
        (lambda: sampling.RetryPolicy(max_attempts=0), "max_attempts must be at least 1, got 0"),
        (lambda: training.Filters(truncated="x"), "truncated must be one of keep, mask, drop"),
    ],
)
def test_python_keeps_to_the_same_bounds(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "test.py::test", "--steps", "0"),
        ("train", "test.py::test", "--schedule", "x"),
        ("filter", "a.parquet", "-o", "b.parquet", "--min-tokens", "0"),
        ("generate", "a.jsonl", "-o", "b.parquet", "--model", "m", "--max-attempts", "0"),
        ("generate", "a.jsonl", "-o", "b.parquet", "--model", "m", "--no-such-flag"),
        ("datums", "a.parquet", "-o", "b.npz", "--truncated", "x"),
        ("stats",),
    ],
)
def test_what_is_out_of_bounds_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    result = ep_rft(*arguments)
    assert result.exit_code == 2
    wrong = next((word for word in reversed(arguments) if word.startswith("--")), "file")
    assert wrong in re.sub(r"\x1b\[[\d;]*m", "", result.stderr)


def test_what_was_typed_counts_although_it_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    result = ep_rft(
        *("datums", tmp_path / "a.parquet", "-o", tmp_path / "b.jsonl", "--format", "rl-step"),
        *("--algorithm", "grpo"),
    )
    assert result.exit_code == 1
    assert "of the options, only the reward applies" in result.stderr


def test_an_option_without_a_flag_is_of_python_alone() -> None:
    names = {name for command in FUNCTIONS for name in flags(command)}
    assert names.isdisjoint({"loss_fn_config", "parts", "on_line", "warn", "progress", "filters"})
    assert "sampler" not in flags("generate")
    assert check_options(loop.LoopOptions(steps=1)) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_fills_its_lines_and_keeps_examples_as_they_are(name: str) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [name, "--help"], prog_name="ep-rft")
    prose, _, rest = re.split("Usage: .*", result.stdout)[1].partition("Examples:")
    for line, following in itertools.pairwise(prose.splitlines()):
        if line.strip() and following.strip():
            word = following.split()[0]
            assert len(f" {line.strip()} {word} ") > 80, f"{word!r} has room behind {line!r}"
    examples = rest.partition("╭")[0].strip("\n").splitlines()[1:]
    assert [line for line in examples if line.strip() and not line.startswith("   ")] == []


def test_the_help_of_no_command_imports_what_it_works_with() -> None:
    heavy = ("eval_protocol", "torch", "transformers", "litellm", "uvicorn", "starlette", "ray")
    program = f"""
import sys
from eval_protocol_rft.cli import app
for name in {list(COMMANDS)!r}:
    try:
        app([name, "--help"])
    except SystemExit as end:
        assert not end.code
print("loaded:", [name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"
