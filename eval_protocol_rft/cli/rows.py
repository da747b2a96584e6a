"""What a command on rollouts takes: a rollout file, or what a test of Eval Protocol wrote."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eval_protocol_rft.cli.failing import say


@contextlib.contextmanager
def rollout_file(path: Path, *, quiet: bool = False) -> Iterator[Path]:
    """`path` where it is a rollout file or that of an unfinished job. Where it holds rows of Eval
    Protocol (JSON lines, or a folder of them, of which the newest counts), a rollout file of these,
    which is gone afterwards.

    Raises:
        RowsFileError, ConvertError: there is neither, or it is broken.
    """
    from eval_protocol_rft.batch.conversion import convert
    from eval_protocol_rft.report.rows import RowsFileError, is_rollouts, newest_rows_file

    if is_rollouts(path) or (not path.exists() and path.suffix):
        yield path
        return
    rows = newest_rows_file(path)
    with tempfile.TemporaryDirectory(prefix="ep-rft-") as folder:
        made = Path(folder) / f"{rows.stem}.parquet"
        summary = convert(rows, made, from_format="ep", drop_failed_rows=True, progress=not quiet)
        for note in summary.notes:
            say(f"ep-rft: {rows}: {note}", err=True)
        try:
            yield made
        except ValueError as error:
            # By the name that the user knows.
            text = str(error)
            if str(made) in text:
                raise RowsFileError(text.replace(str(made), str(rows))) from error
            raise
