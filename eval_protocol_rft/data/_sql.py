"""SQL over a rollout file, by DuckDB.

`completions` has a row a completion: the columns of the file, and `tokens` and `passed`. `rollouts`
has a row a data row: what all its completions share, and the numbers that statistics and filters
are made of (`group_numbers`).

Invariant: a query reads the one file that it was given, unless it was given leave, and changes
nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._options import Flag
from eval_protocol_rft._statistics import GROUP_NUMBERS
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_file
from eval_protocol_rft.data._format import ORIGINAL_PREFIX
from eval_protocol_rft.data._job_store import KEY_COLUMNS
from eval_protocol_rft.data._jsonl import is_jsonl, to_json_values
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._row_groups import open_parquet
from eval_protocol_rft.data._stats import SAMPLED_COLUMNS, numbers_of_groups, read_numbers
from eval_protocol_rft.training import MissingPackageError

if TYPE_CHECKING:
    import duckdb


_BATCH_ROWS = 10_000


class QueryError(EvalProtocolRftError, ValueError):
    """SQL that cannot be run, or that does more than read."""


@contextlib.contextmanager
def connected(what: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """A database that ends with the block, and a folder of its own.

    Raises:
        MissingPackageError: DuckDB is not installed; `what` is what needs it.
    """
    try:
        import duckdb
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs DuckDB, which is not installed: pip install 'eval-protocol-rft[bulk]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="ep-rft-") as folder, duckdb.connect() as connection:
        connection.execute(f"set temp_directory = {_text(Path(folder) / 'spilled')}")
        # What a query names is a table of this database, never a variable of this program, and
        # nothing comes from the network.
        for name in ("python_enable_replacements", "autoinstall_known_extensions"):
            connection.execute(f"set {name} = false")
        connection.execute("set TimeZone = 'UTC'")
        yield connection, Path(folder)


def add_tables(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    dataset: RolloutDataset,
    reading: Reading,
    reward: str,
    groups: Mapping[str, NDArray[Any]],
    *,
    pass_threshold: float,
    other_files: bool = False,
) -> None:
    """Make `completions` and `rollouts` of a file, and leave the connection nothing else to read.

    `completions` is read when a query asks for it: of Parquet, only the columns that it asks for.

    Args:
        folder: where to put what is not in Parquet yet.
        reading: told of the pass over a file that is put there.
        reward: column that `passed` is of.
        groups: the numbers of the data rows, see `group_numbers`.
        pass_threshold: a completion passes where its reward is at least this.
        other_files: queries may read other files, too.
    """
    path = folder / "rollouts.parquet"
    if dataset.finished and not is_jsonl(dataset.path) and _has_every_column(dataset):
        path.symlink_to(dataset.path.absolute())  # so that no character of its name is a pattern
    else:
        write_file(path, dataset.schema, reading(dataset.tables()))
    names = [name for name in dataset.schema.names if name not in ("tokens", "passed")]
    tokens = "len(completion_ids)"
    if "segment_loss_mask" in names:  # of all turns
        tokens = f"coalesce(list_sum(flatten(segment_loss_mask))::bigint, {tokens})"
    connection.execute(
        f"create view placed as select {', '.join(map(_name, names))}, file_row_number as place, "
        f"{tokens} as tokens, {_name(reward)} >= {pass_threshold!r}::double as passed "
        f"from read_parquet({_text(path)}, file_row_number = true)"
    )
    connection.execute("create view completions as select * exclude (place) from placed")
    sizes = groups["num_completions"]
    numbers = {"first_place": pa.array(np.cumsum(sizes) - sizes)}
    numbers |= {name: pa.array(values, from_pandas=True) for name, values in groups.items()}
    connection.register("numbers", pa.Table.from_pydict(numbers))
    of_row = [name for name in _OF_ROWS if name in names]
    of_row += [name for name in names if name.startswith(ORIGINAL_PREFIX)]
    connection.execute(
        f"create temp view rollouts as select {', '.join(f'p.{_name(n)}' for n in of_row)}, "
        "n.* exclude (first_place) from numbers n join placed p on p.place = n.first_place"
    )
    if not other_files:
        connection.execute(f"set allowed_paths = [{_text(path)}]")
        connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def _has_every_column(dataset: RolloutDataset) -> bool:
    """Whether a Parquet file has all columns itself, and none that is null for being left out."""
    with open_parquet(dataset.path) as file:
        return set(file.schema_arrow.names).issuperset(dataset.schema.names)


_OF_ROWS = ("row_id", "data_idx", "prompt", "tools", "ground_truth")
"""Columns that are the same in all completions of a data row."""


def _text(value: object) -> str:
    return "'" + os.fspath(str(value)).replace("'", "''") + "'"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


@contextlib.contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """DuckDB's errors as `QueryError`, without the picture of where in the text they are.

    Args:
        what: what was asked, in front of the reason.
    """
    import duckdb

    try:
        yield
    except (duckdb.Error, pa.ArrowException, RuntimeError) as error:
        # It takes Ctrl-C for an error of the query.
        if isinstance(error, duckdb.InterruptException) or str(error) == "Query interrupted":
            raise KeyboardInterrupt from error
        if not isinstance(error, (duckdb.Error, pa.ArrowException)):
            raise
        lines = str(error).split("\nLINE ")[0].split("\n")
        raise QueryError(f"{what}: {' '.join(filter(None, map(str.strip, lines)))}") from error


def rows_where(
    dataset: RolloutDataset,
    expression: str,
    reading: Reading,
    reward: str,
    pass_threshold: float,
    groups: Mapping[str, NDArray[Any]],
) -> NDArray[np.bool_]:
    """[N] of which completions of a file an SQL expression is true, in their order; arguments as
    for `add_tables`.

    Args:
        expression: over the columns of `completions` and the numbers of `rollouts`.

    Raises:
        QueryError: it is no expression, or fails on a row.
        MissingPackageError: DuckDB is not installed.
    """
    with connected("a filter with `where`") as (connection, folder):
        add_tables(
            connection, folder, dataset, reading, reward, groups, pass_threshold=pass_threshold
        )
        with said_in_one_line(f"where {expression!r}"):
            import duckdb

            wanted = duckdb.SQLExpression(expression).cast("boolean").alias("wanted")
            joined = connection.sql(
                f"select p.*, {', '.join(GROUP_NUMBERS)} "
                "from placed p join rollouts using (data_idx)"
            )
            columns = joined.select(wanted, duckdb.ColumnExpression("place")).fetchnumpy()
    flags = np.zeros(len(columns["place"]), np.bool_)
    flags[columns["place"]] = np.ma.filled(columns["wanted"], fill_value=False)
    return flags


@contextlib.contextmanager
def run_query(
    path: str | os.PathLike[str],
    query: str,
    *,
    reward: Annotated[str | None, Flag(unset="the main one")] = None,
    pass_threshold: Annotated[float, Flag()] = 1.0,
    other_files: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> Iterator[pa.RecordBatchReader]:
    """What a query says of a rollout file, or of what an unfinished job has put aside, as it comes.

    Args:
        path: the file, read by the query as the tables `completions` and `rollouts`.
        query: one that only reads, such as `select row_id, pass_rate from rollouts`.
        reward: name of a further reward.
        pass_threshold: reward from which on a completion counts as passed.
        other_files: let the query read other files, too.
        progress: show a bar where reading takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, or a broken one; no such reward.
        QueryError: the query cannot be run, or would change something.
        MissingPackageError: DuckDB is not installed.
    """
    dataset = RolloutDataset(path)
    column = dataset.reward_column(reward)
    with connected("SQL") as (connection, folder):
        with Reading("sql", dataset.rows_about, show=progress) as reading:
            columns = [*KEY_COLUMNS, "error", "truncated", *SAMPLED_COLUMNS, column]
            columns = [name for name in columns if name in dataset.schema.names]
            rows, _ = read_numbers(reading(dataset.tables(columns)), column, where=dataset.where)
            groups = numbers_of_groups(rows, pass_threshold)
            add_tables(
                connection,
                folder,
                dataset,
                reading,
                column,
                groups,
                pass_threshold=pass_threshold,
                other_files=other_files,
            )
        with said_in_one_line("sql"):
            kinds = [statement.type.name for statement in connection.extract_statements(query)]
            if kinds not in (["SELECT"], ["EXPLAIN"]):
                raise QueryError(
                    f"sql: one query that reads is needed, such as `select * from rollouts`; this "
                    f"is {' and '.join(kinds) or 'none'}"
                )
            yield connection.sql(query).to_arrow_reader(_BATCH_ROWS)


def plain_rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    """The rows of a batch as values that JSON has, spelled as in JSON lines of rollouts."""
    return zip(*map(_plain, batch.columns), strict=True)


def _plain(column: pa.Array) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if pa.types.is_decimal(kind) and kind.scale == 0:  # DuckDB's sums of integers
        return [None if value is None else int(value) for value in column.to_pylist()]
    try:
        values = to_json_values(pa.chunked_array([column]))
    except pa.ArrowException:  # intervals, and what else has no form there
        values = [None if value is None else str(value) for value in column.to_pylist()]
    return list(msgspec.to_builtins(values))
