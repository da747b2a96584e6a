"""A job that dies anywhere, and is started again, loses nothing and does nothing twice."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import FileMetadata, RewardSettings, schema
from eval_protocol_rft.data._job_file import BusyError
from eval_protocol_rft.data._job_store import JobStore, parts_folder
from eval_protocol_rft.data._jsonl import metadata_path
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.record import Score
from tests.data.store_crashes import ASKED, KEYS_OF, SCHEMA, check, live, row
from tests.data.traced import ENDS, End, Fate, needs_tracing, run_in_child

pytestmark = needs_tracing

FAILED = ASKED[1::3]


@pytest.fixture(params=["a few calls", pytest.param("every call", marks=pytest.mark.slow)])
def thorough(request: pytest.FixtureRequest) -> bool:
    return request.param == "every call"


def deaths(calls: int, *, thorough: bool) -> list[tuple[int, End]]:
    """At which call to die, and how: all of it, or a sample that has the last calls, where the file
    appears and the folder goes."""
    if thorough:
        return [(call, end) for call in range(calls) for end in ENDS]
    rng = random.Random(calls)
    sample = rng.sample(range(calls - 8), 10)
    return [(call, rng.choice(ENDS)) for call in [*sample, *range(calls - 8, calls)]]


def fast_folder() -> Path:
    """In memory where there is such a folder: what a sync is worth is played here anyway."""
    memory = Path("/dev/shm")  # noqa: S108
    return Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))


@pytest.fixture
def fast_path() -> Iterator[Path]:
    folder = fast_folder()
    yield folder
    shutil.rmtree(folder)


def output_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder / "a.parquet"


def write_base(output: Path) -> None:
    """A finished file, some of whose completions failed."""
    write_rows(output, SCHEMA, [row(pair, -1, failed=pair in FAILED) for pair in ASKED])


@pytest.fixture(scope="module")
def calls() -> int:
    """Of the system, by a job that nothing happens to."""
    folder = fast_folder()
    output = output_in(folder / "x")
    life = live(output, 1, Fate())
    assert sorted(life.stored) == ASKED
    check(output, [life])
    shutil.rmtree(folder)
    return life.calls


def test_a_job_that_died_at_any_call_goes_on_from_what_was_stored(
    thorough: bool, calls: int, fast_path: Path
):
    for call, end in deaths(calls, thorough=thorough):
        output = output_in(fast_path / f"{call}-{end}")
        first = live(output, 1, Fate(end, death=call))
        assert first.killed
        check(output, [first, live(output, 2)])


def test_a_job_that_died_while_it_recovered_goes_on(thorough: bool, calls: int, fast_path: Path):
    rng = random.Random(0)
    for i in range(300 if thorough else 10):
        output = output_in(fast_path / str(i))
        first = live(output, 1, Fate(rng.choice(ENDS), death=rng.randrange(calls)))
        second = live(output, 2, Fate(rng.choice(ENDS), death=rng.randrange(40)))
        check(output, [first, second, live(output, 3)])


def test_retrying_failures_that_died_keeps_what_succeeded(thorough: bool, fast_path: Path):
    output = output_in(fast_path / "x")
    write_base(output)
    calls = live(output, 1, Fate(), retry_failed=True).calls
    for call, end in deaths(calls, thorough=thorough):
        output = output_in(fast_path / f"{call}-{end}")
        write_base(output)
        first = live(output, 1, Fate(end, death=call), retry_failed=True)
        assert first.killed
        assert len(pq.read_table(output)) == len(ASKED)
        second = live(output, 2, retry_failed=True)
        assert {*first.stored, *second.stored} <= set(FAILED)
        check(output, [first, second], untouched=set(ASKED) - set(FAILED))


def test_a_full_disk_at_any_call_loses_nothing_even_if_the_job_then_dies(
    thorough: bool, calls: int, fast_path: Path
):
    rng = random.Random(0)
    for call, end in deaths(calls, thorough=thorough):
        output = output_in(fast_path / f"{call}-{end}")
        first = live(output, 1, Fate(end, full=call, death=call + rng.randrange(1, 40)))
        check(output, [first, live(output, 2)])


def test_a_job_that_goes_on_after_a_full_disk_stores_everything(calls: int, fast_path: Path):
    went_on = 0
    for call in range(0, calls, 2):
        output = output_in(fast_path / str(call))
        life = live(output, 1, Fate(full=call))
        if life.calls != -1:
            went_on += 1
            assert sorted(life.stored) == ASKED
            check(output, [life])
    assert went_on > calls // 6


def test_a_second_process_is_refused_and_the_first_goes_on(fast_path: Path):
    output = output_in(fast_path / "x")
    store = JobStore(parts_folder(output), SCHEMA, KEYS_OF)
    store.append(to_record_batch([row(ASKED[0], 0)], SCHEMA))
    with pytest.raises(BusyError, match="another process is writing here"):
        JobStore(parts_folder(output), SCHEMA, KEYS_OF)
    store.append(to_record_batch([row(ASKED[1], 0)], SCHEMA))
    assert sum(len(keys) for keys, _ in store.stored()) == 2
    store.close()
    JobStore(parts_folder(output), SCHEMA, KEYS_OF).close()


def write_lines(path: Path, generation: int, *, style: bool) -> None:
    """JSON lines, with a further reward or without."""
    rewards = {"reward_style": RewardSettings(evaluator="style", fingerprint="f")} if style else {}
    rows = [row(pair, generation) for pair in ASKED]
    for each in rows:
        each.scores = {name: Score(reward=1.0) for name in ("reward", *rewards)}
    write_rows(path, schema(FileMetadata(rewards=rewards), {"level": pa.int64()}), rows)


def calls_of_writing_lines(path: Path, fate: Fate) -> int:
    """Replace lines in a child; how many calls of the system it made, or -1 where it died."""

    def work() -> int:
        write_lines(path, 2, style=True)
        return 0

    status, calls = run_in_child(work, path.parent, fate)
    return calls if status == 0 else -1


def test_lines_and_their_metadata_change_together_wherever_their_writer_dies(fast_path: Path):
    output = output_in(fast_path / "x").with_suffix(".jsonl")
    write_lines(output, 1, style=False)
    calls = calls_of_writing_lines(output, Fate())
    seen = []
    output = output_in(fast_path / "base").with_suffix(".jsonl")
    write_lines(output, 1, style=False)
    for call, end in zip(range(calls), itertools.cycle(ENDS), strict=False):
        folder = fast_path / f"{call}-{end}"
        shutil.copytree(output.parent, folder)
        output = folder / output.name
        assert calls_of_writing_lines(output, Fate(end, death=call)) < 0
        dataset = RolloutDataset(output)
        rows = list(dataset)
        is_new = rows[0].seed == 2
        assert [each.seed for each in rows] == [2 if is_new else 1] * len(ASKED)
        assert list(dataset.metadata.rewards) == (["reward_style"] if is_new else [])
        assert {len(each.scores) for each in rows} == {2 if is_new else 1}
        seen.append(is_new)
        if call % 5 == 0:
            write_lines(output, 3, style=True)
            assert b"replaces" not in metadata_path(output).read_bytes()
        output = fast_path / "base" / output.name
    assert seen[0] is False
    assert seen[-1] is True
