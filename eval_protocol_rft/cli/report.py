"""`ep-rft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import eval_protocol_rft.report as room
from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import fail, reason_of, rollout_file, say
from eval_protocol_rft.cli._flags import Takes


def report(
    path: Annotated[Path, Flag(metavar="FILE")],
    options: Annotated[dict[str, Any], Takes(room.write_report)],
    *,
    output: Annotated[
        Path | None, Flag("-o", unset="FILE with .html for its suffix; in a run, report.html")
    ] = None,
) -> None:
    """Write rollouts as one HTML page: numbers, difficulty, every completion token by token.

    Of a training run: its curves, from the run's folder (`ep-rft train` writes the page, too).

    Args:
        path: Rollout file, what a test wrote, or folder of a training run.
        output: The page.

    Examples:
      ep-rft report rollouts.parquet -o report.html
      ep-rft report rollouts.parquet --pass-threshold 0.5 --limit 100
      ep-rft report rollouts.parquet --tokenizer Qwen/Qwen3-0.6B
      ep-rft report run -o training.html
    """
    from eval_protocol_rft.data import RolloutDataset

    if room.is_run_folder(path):
        for name in options.keys() - {"progress"}:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} is for rollout files, and {path} is the folder of a training run")
        _report_run(path, output)
        return
    output = output or path.with_suffix(".html")
    try:
        with rollout_file(path, progress=options["progress"]) as file:
            written = room.write_report(RolloutDataset(file), output, **options)
    except OSError as error:
        fail(f"cannot write {output}: {reason_of(error)}")
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
        fail(f"cannot write {output or folder / 'report.html'}: {reason_of(error)}")
    curve = "" if written.curve is None else f", {written.curve}"
    say(
        f"Report of {written.steps:,} steps and {written.evaluations:,} evaluations: "
        f"{written.page} ({written.size / 1e6:.1f} MB){curve}"
    )
