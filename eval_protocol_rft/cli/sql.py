"""`ep-rft sql`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from eval_protocol_rft import data
from eval_protocol_rft.cli._common import fail, rollout_file, say, say_json
from eval_protocol_rft.cli._flags import Takes


def sql(
    file: Path,
    query: str,
    options: Annotated[dict[str, Any], Takes(data.run_query)],
    *,
    json: bool = False,
    csv: bool = False,
    limit: Annotated[int, Ge(1)] = 100,
) -> None:
    """Ask a rollout file anything, in DuckDB's SQL.

    Table `completions` has a row a completion: the columns of the file, and
    tokens and passed. Table `rollouts` has a row a prompt: row_id, data_idx,
    prompt, tools, ground_truth, original_*, and the numbers of its completions:
    num_completions, num_failed, num_scored, num_passed, num_truncated,
    num_tokens, pass_rate, mean_reward, min_reward, max_reward.

    Args:
        file: Rollout file, also of an unfinished job, or what a test wrote.
        query: One query that reads.
        json: Print a JSON object a row.
        csv: Print CSV.
        limit: Most rows of a table.

    Examples:
      ep-rft sql rollouts.parquet "select * from rollouts order by pass_rate"
      ep-rft sql rollouts.parquet --csv "select original_level, avg(reward)
        from completions group by all order by all"
      ep-rft sql rollouts.parquet "describe completions"
    """
    if json and csv:
        fail("--json and --csv: choose one of them")
    with (
        rollout_file(file, progress=options["progress"]) as path,
        data.run_query(path, query, **options) as batches,
    ):
        names = batches.schema.names
        rows = chain.from_iterable(map(data.plain_rows, batches))
        if json:
            _print_json(names, rows)
        elif csv:
            _print_csv(names, rows)
        else:
            _print_table(names, rows, limit)


def _print_json(names: list[str], rows: Iterable[tuple[object, ...]]) -> None:
    from json import dumps

    for row in rows:
        values = dict(zip(names, row, strict=True))
        say_json(dumps(values, ensure_ascii=False, allow_nan=False).encode())


def _print_csv(names: list[str], rows: Iterable[tuple[object, ...]]) -> None:
    import csv
    from io import StringIO

    for row in chain([names], rows):
        line = StringIO()
        csv.writer(line, lineterminator="").writerow(map(_cell, row))
        say(line.getvalue())


def _print_table(names: list[str], rows: Iterable[tuple[object, ...]], limit: int) -> None:
    """A line a row; where that would be too wide, a line a value."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from eval_protocol_rft._text import visible

    def shown(value: object) -> Text:
        text = visible(_cell(value))
        longest = _LONGEST_CELL
        return Text(text if len(text) <= longest else text[: longest - 3] + "...")

    rows, console = iter(rows), Console()
    first = list(islice(rows, limit))
    if len(names) * _NARROWEST_COLUMN <= console.width:
        table = Table(header_style="bold")
        for name in names:
            table.add_column(Text(visible(name)))
        for row in first:
            table.add_row(*map(shown, row))
    else:
        table = Table(box=None, show_header=False)
        for row in first:
            for name, value in zip(names, row, strict=True):
                table.add_row(Text(visible(name), style="bold"), shown(value))
            table.add_row()
    console.print(table)
    if next(rows, None) is not None:
        say("... and more rows: --limit shows more, --json and --csv all of them")


_LONGEST_CELL = 200
_NARROWEST_COLUMN = 10


def _cell(value: object) -> str:
    from json import dumps

    if value is None:
        return ""
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)
