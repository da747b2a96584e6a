"""What a rollout file or a training run holds, for a person: `ep-rft show`, `stats`, `sql`,
`report`. None of them changes what it reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from eval_protocol_rft import data
from eval_protocol_rft import report as room
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli import _common as common
from eval_protocol_rft.cli._common import Input, fail, rollout_file, say
from eval_protocol_rft.cli._flags import Takes


def show(paths: list[Input], options: Annotated[dict[str, Any], Takes(room.rollout_table)]) -> None:
    """Show rollouts: prompts, completions, rewards, sums.

    Args:
        paths: Rows of Eval Protocol (.jsonl, or a folder of them), or rollouts, also of a job that
            is not finished; also URLs.

    Examples:
      EP_OUTPUT_DIR=results pytest examples/arithmetic && ep-rft show results
      ep-rft show rollouts.parquet --limit 50
    """
    for path in paths:
        place = data.one_place(path)
        with place.here(data.METADATA_SUFFIX) as here:
            file = room.newest_rows_file(here)
            rows = list(room.read_rows(file))
            if not rows and file.is_file():
                fail(f"{file if place.is_plain else place.shown}: it holds no rows")
            if not file.is_file():
                text = "the job is not finished: this is what is stored of it so far"
                say(f"{path}: {text}", err=True)
        common.say_table(room.rollout_table(rows, **options))


def stats(
    file: Input,
    options: Annotated[dict[str, Any], Takes(data.rollout_stats)],
    *,
    limit_groups: Annotated[int, Ge(0)] = 20,
    json: bool = False,
) -> None:
    """Sum up a rollout file: rewards, pass@k, lengths, failures, the hardest prompts.

    Args:
        file: Rollout file, also of an unfinished job, or what a test wrote; also a URL.
        limit_groups: Prompts to list, the hardest ones.
        json: Print JSON instead, with all prompts.

    Examples:
      ep-rft stats rollouts.parquet
      ep-rft stats rollouts.parquet --reward style --pass-threshold 0.5
      ep-rft stats rollouts.parquet --json | jq '.pass_at_k'
    """
    import msgspec

    with rollout_file(file, progress=options["progress"]) as path:
        statistics = data.rollout_stats(path, **options)
    statistics = replace(statistics, path=data.shown(file))
    if json:
        common.say_json(msgspec.json.format(msgspec.json.encode(statistics), indent=2))
        return
    common.say_table(room.stats_table(statistics, limit_groups=limit_groups))


def sql(
    file: Input,
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
        file: Rollout file, also of an unfinished job, or what a test wrote; also a URL.
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
    for row in rows:
        values = dict(zip(names, row, strict=True))
        common.say_json(dumps(values, ensure_ascii=False, allow_nan=False).encode())


def _print_csv(names: list[str], rows: Iterable[tuple[object, ...]]) -> None:
    import csv
    from io import StringIO

    for row in chain([names], rows):
        line = StringIO()
        csv.writer(line, lineterminator="").writerow(map(_cell, row))
        say(line.getvalue())


def _print_table(names: list[str], rows: Iterable[tuple[object, ...]], limit: int) -> None:
    """A line a row; where that would be too wide, a line a value."""
    from rich.table import Table
    from rich.text import Text

    from eval_protocol_rft._text import visible

    def shown(value: object) -> Text:
        text = visible(_cell(value))
        longest = _LONGEST_CELL
        return Text(text if len(text) <= longest else text[: longest - 3] + "...")

    rows = iter(rows)
    table = Table(header_style="bold")
    for name in names:
        table.add_column(Text(visible(name)))
    for row in islice(rows, limit):
        table.add_row(*map(shown, row))
    common.say_table(room.WideTable(table, len(names) * _NARROWEST_COLUMN))
    if next(rows, None) is not None:
        say("... and more rows: --limit shows more, --json and --csv all of them")


_LONGEST_CELL = 200
_NARROWEST_COLUMN = 10


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)


def report(
    path: Annotated[Input, Flag(metavar="FILE")],
    options: Annotated[dict[str, Any], Takes(room.write_report)],
    *,
    output: Annotated[
        Path | None, Flag("-o", unset="FILE with .html for its suffix; in a run, report.html")
    ] = None,
) -> None:
    """Write rollouts as one HTML page: numbers, difficulty, every completion token by token.

    Of a training run: its curves, from the run's folder (`ep-rft train` writes the page, too).

    Args:
        path: Rollout file or its URL, what a test wrote, or folder of a training run.
        output: The page.

    Examples:
      ep-rft report rollouts.parquet -o report.html
      ep-rft report rollouts.parquet --pass-threshold 0.5 --limit 100
      ep-rft report rollouts.parquet --tokenizer Qwen/Qwen3-0.6B
      ep-rft report run -o training.html
    """
    if isinstance(path, Path) and room.is_run_folder(path):
        for name in options.keys() - {"progress"}:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} is for rollout files, and {path} is the folder of a training run")
        _report_run(path, output)
        return
    if output is None:
        beside = data.plain_name(data.one_place(path).path).with_suffix(".html")
        output = Path(beside if isinstance(path, Path) else beside.name)
    with rollout_file(path, progress=options["progress"]) as file:
        dataset = data.RolloutDataset(file)
        try:
            written = room.write_report(dataset, output, **options)
        except OSError as error:
            fail(f"cannot write {output}: {common.reason_of(error)}")
    for problem in written.problems:
        say(f"ep-rft: tokens are shown as ids: {problem}", err=True)
    if written.shown_prompts < written.prompts:
        say(
            f"Texts of the first {written.shown_prompts:,} of {written.prompts:,} prompts are in "
            "the page; --limit takes more. Its statistics are of all."
        )
    say(
        f"Report of {written.completions:,} completions: {written.path} "
        f"({written.size / 1e6:.1f} MB)"
    )


def _report_run(folder: Path, output: Path | None) -> None:
    try:
        written = room.write_training_report(folder, output)
    except OSError as error:
        fail(f"cannot write {output or folder / 'report.html'}: {common.reason_of(error)}")
    curve = "" if written.curve is None else f", {written.curve}"
    say(
        f"Report of {written.steps:,} steps and {written.evaluations:,} evaluations: "
        f"{written.page} ({written.size / 1e6:.1f} MB){curve}"
    )
