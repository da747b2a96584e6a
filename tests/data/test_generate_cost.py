"""What a run cost, where the prices are given."""

from __future__ import annotations

import re

import pytest

from tests.data.servers import at, refused, rows_by_pair, succeed, texts, write_jsonl
from tests.stub_server import Status

PRICES = ("--price-in", "1000", "--price-out", "3000")


@pytest.fixture
def command(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "data.jsonl", texts(6))
    output = tmp_path / "out.parquet"
    return ["generate", data, "-o", output, "-n", "3", *at(server, tokenizer_folder)]


def test_the_end_of_a_run_says_what_it_cost(command, tmp_path):
    said = succeed(*command, *PRICES).stdout
    rows = rows_by_pair(tmp_path / "out.parquet").values()
    prompts = sum(len(row["prompt_ids"]) for row in rows) / 1000
    sampled = 3 * sum(len(row["completion_ids"]) for row in rows) / 1000
    cost = f"cost: ${prompts + sampled:.4f}: prompts ${prompts:.4f}, completions ${sampled:.4f}"
    assert cost in said
    again = succeed(*command, *PRICES).stdout
    assert "nothing to do" in again
    assert "cost" not in again


def test_attempts_that_were_turned_away_cost_nothing(command, server):
    server.script = lambda seen: Status(503) if seen.attempt == 1 else None
    dear = succeed(*command, *PRICES, "--overwrite").stdout
    server.script = lambda seen: None
    cheap = succeed(*command[:4], *command[4:], "--seed", "2", "--overwrite", *PRICES).stdout
    prompts = [re.search(r"prompts (\$[0-9.]+)", said) for said in (dear, cheap)]
    assert prompts[0] is not None
    assert prompts[1] is not None
    assert prompts[0][1] == prompts[1][1]


def test_the_cost_is_said_once(command):
    said = succeed(*command, *PRICES, "--verbose").stdout
    assert len(re.findall("^cost", said, re.MULTILINE)) == 1


def test_without_prices_nothing_is_said_of_a_cost(command):
    assert "cost" not in succeed(*command).stdout


@pytest.mark.parametrize(
    ("prices", "why"),
    [
        (["--price-in", "1"], "go together"),
        (["--price-out", "1"], "go together"),
        (["--price-in", "1", "--price-out", "inf"], "at least 0"),
    ],
)
def test_half_a_price_or_none_at_all_is_refused(prices, why, command):
    assert why in refused(*command, *prices)
