"""The ray engine, on a cluster of two nodes that are processes of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._job_store import count_stored, parts_folder, read_schema
from eval_protocol_rft.scoring.executors._ray import (
    MOST_START_DEATHS,
    NodeActors,
    RayEngineError,
    Work,
)
from tests.data.ray_work import Dying, Unable, Where

WORK = Path(__file__).with_name("ray_work.py")
PARAMS = {"model": "local/arithmetic", "seed": 5, "max_tokens": 8}
DEADLY = ["exit 3", "be killed", "crash", "exit in a task", "cancel all", "stop the loop", "raise"]
MISBEHAVING = [*("x" * i for i in range(1, 20)), *DEADLY]
"""Completions that `length_async` scores, and some with which it scores nothing."""
TOKEN = "k3y-of-the-judge-4711"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    running = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    running.add_node(**small)
    ray.init(running.address, log_to_driver=False)
    yield running
    ray.shutdown()
    running.shutdown()


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+{i // 7}="}) + "\n" for i in range(100)))
    return file


def generate(data: Path, output: Path, n: int = 4, **options: Any) -> Any:
    from eval_protocol_rft.data._generate import generate as run

    return run(data, output, {**PARAMS, "n": n}, progress=False, **options)


def rows_of(file: Path) -> dict[tuple[int, int], CompletionRow]:
    rows = list(RolloutDataset(file).rows())
    by_place = {(row.data_idx, row.sample_idx): row for row in rows}
    assert len(by_place) == len(rows)
    return by_place


def assert_same_completions(one: Path, other: Path) -> None:
    ours, theirs = rows_of(one), rows_of(other)
    assert ours.keys() == theirs.keys()
    for place, row in ours.items():
        twin = theirs[place]
        assert (row.response, row.seed, row.error) == (twin.response, twin.seed, None)
        assert row.completion_ids.tolist() == twin.completion_ids.tolist()
        # Batches differ, and with them float noise.
        np.testing.assert_allclose(row.logprobs, twin.logprobs, atol=1e-4)


def actor_pids(name: str) -> list[int]:
    """Actors under this process's raylets, or any driver's on the cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(f"ray::{name}".encode()) and _descends_from_us(int(folder.name)):
            found.append(int(folder.name))
    return found


def _descends_from_us(pid: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == os.getpid():
            return True
    return False


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return found


def has_stored(output: Path) -> bool:
    folder = parts_folder(output)
    return read_schema(folder) is not None and count_stored(folder) > 0


@pytest.mark.ray
def test_every_node_has_one_actor_and_the_one_with_the_least_to_do_is_next(cluster):
    actors = NodeActors(None, lambda _: Work(Where, {}, cpus=1, calls=2))
    try:
        actors.connect()
        taken = [take(actors)]
        wait_for(lambda: actors.free() is not taken[0])
        taken += [take(actors) for _ in range(3)]
        assert sorted(a.node.id for a in taken) == sorted(2 * [n.node_id for n in alive(cluster)])
        assert all(node_of(actor) == actor.node.id for actor in taken)
        assert actors.free() is None
    finally:
        actors.close()


@pytest.mark.ray
def test_a_node_that_joins_takes_part_and_one_that_leaves_is_given_up(cluster):
    import ray

    actors = NodeActors(None, lambda _: Work(Where, {}, cpus=1, calls=1))
    try:
        actors.connect()
        first, second = take(actors), take(actors)
        joined = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        newcomer = take(actors)
        assert newcomer.node.id == joined.node_id not in (first.node.id, second.node.id)
        cluster.remove_node(joined)
        with pytest.raises(actors.gone):
            ray.get(newcomer.handle.node.remote(), timeout=60)
        actors.lost(newcomer)
        assert actors.free() is None
        second.busy = 0
        assert take(actors) is second
    finally:
        actors.close()


@pytest.mark.ray
def test_a_node_that_cannot_do_the_work_is_named_with_the_reason(cluster):
    actors = NodeActors(None, lambda _: Work(Unable, {}, cpus=1, calls=1))
    with pytest.raises(RayEngineError, match=r"Ray node [\d.]+: no such model here"):
        wait_for(actors.free)
    actors.close()


@pytest.mark.ray
def test_an_actor_that_dies_at_every_start_ends_the_run(cluster):
    actors = NodeActors(None, lambda _: Work(Dying, {}, cpus=1, calls=1))
    with pytest.raises(RayEngineError, match=f"died {MOST_START_DEATHS} times while it started"):
        wait_for(actors.free)
    actors.close()


@pytest.mark.ray
def test_completions_are_those_of_the_local_engine(cluster, problems, tmp_path):
    local, remote = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    generate(problems, local)
    summary = generate(problems, remote, engine="ray")
    assert (summary.total, summary.failed, summary.run.completions) == (400, 0, 400)
    assert_same_completions(remote, local)


@pytest.mark.ray
def test_killed_actors_cost_attempts_and_no_completion(cluster, problems, tmp_path):
    local, remote = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    killed: list[int] = []

    def kill_all() -> None:
        wait_for(lambda: has_stored(remote))
        for pid in actor_pids("RolloutActor"):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill_all)
    killer.start()
    generate(problems, remote, n=30, engine="ray", concurrency=64)
    killer.join()
    assert killed
    generate(problems, local, n=30)
    assert_same_completions(remote, local)
    assert max(row.attempts for row in rows_of(remote).values()) > 1


DRIVER = """
import sys
from pathlib import Path
from tests.data.test_ray import generate
generate(Path(sys.argv[1]), Path(sys.argv[2]), n=30, engine="ray", ray_address=sys.argv[3])
"""


@pytest.mark.ray
def test_a_killed_driver_takes_its_actors_along_and_the_same_call_goes_on(
    cluster, problems, tmp_path
):
    local, remote = tmp_path / "local.parquet", tmp_path / "ray.parquet"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, problems, remote, cluster.address],
        cwd=Path(__file__).parents[2],
    )
    wait_for(lambda: has_stored(remote) or driver.poll() is not None)
    assert actor_pids("RolloutActor")
    driver.kill()
    driver.wait()
    assert not remote.exists()
    wait_for(lambda: not actor_pids("RolloutActor"))
    summary = generate(problems, remote, n=30, engine="ray")
    assert 0 < summary.run.completions < summary.total == 3000
    generate(problems, local, n=30)
    assert_same_completions(remote, local)


@pytest.mark.ray
def test_the_key_reaches_the_server_and_no_log(cluster, problems, tmp_path, server):
    from eval_protocol_rft.data._generate import generate as run
    from tests.rollouts import chat_tokenizer

    params = {"model": "m", "base_url": server.url, "api_key": TOKEN, "n": 2}
    run(
        problems,
        tmp_path / "ray.parquet",
        params,
        tokenizer=chat_tokenizer(),
        limit=20,
        engine="ray",
        progress=False,
    )
    assert {seen.headers["Authorization"] for seen in server.requests} == {f"Bearer {TOKEN}"}
    logs = [f for f in Path(cluster.head_node.get_logs_dir_path()).rglob("*") if f.is_file()]
    assert logs
    assert not [log for log in logs if TOKEN.encode() in log.read_bytes()]


@pytest.mark.ray
def test_each_item_is_graded_as_on_one_machine_also_where_the_evaluator_misbehaves(cluster):
    from eval_protocol_rft.scoring.executors._pool import score_items
    from eval_protocol_rft.scoring.executors._ray import score_items_on_ray
    from tests.data.grading_runs import grader, one_each

    texts = [*("x" * i for i in range(1, 40)), "sleep", "exit 3", "be killed", "raise", "sys.exit"]
    results = [
        {
            graded.key: graded.results
            for graded in run(one_each(texts), grader("length"), workers=1, timeout=2.0)
        }
        for run in (score_items, score_items_on_ray)
    ]
    assert len(results[1]) == len(texts)
    assert results[0] == results[1]
    assert results[1]["sleep"][0].error == "no result within 2 s"


@pytest.mark.ray
def test_async_evaluators_run_on_the_nodes_too(cluster):
    from eval_protocol_rft.scoring.executors._loading import load_evaluator
    from eval_protocol_rft.scoring.executors._ray import score_items_on_ray
    from tests.data.grading_runs import one_each

    evaluator = load_evaluator(f"{WORK}::pid_later")
    items = one_each(f"{i}" for i in range(60))
    done = list(score_items_on_ray(items, evaluator, max_concurrency=4))
    assert sorted(graded.key for graded in done) == sorted(f"{i}" for i in range(60))
    assert os.getpid() not in {graded.results[0].reward for graded in done}


@pytest.mark.ray
def test_each_call_of_an_async_evaluator_is_graded_as_on_one_machine_though_it_misbehaves(cluster):
    from eval_protocol_rft.scoring.executors._pool import score_items
    from eval_protocol_rft.scoring.executors._ray import score_items_on_ray
    from tests.data.grading_runs import grader, one_each

    items = one_each(MISBEHAVING)
    evaluator = grader("length_async")
    results = [
        {graded.key: graded.results for graded in run(items, evaluator, timeout=None)}
        for run in (score_items, score_items_on_ray)
    ]
    assert len(results[1]) == len(items)
    assert results[0] == results[1]


def test_a_node_grades_with_an_async_evaluator_in_a_process_of_its_own():
    from eval_protocol_rft.scoring.executors._ray import LoopScorer
    from tests.data.grading_runs import grader, view

    evaluator = grader("length_async")

    async def graded() -> list[Any]:
        own = LoopScorer(evaluator.spec, evaluator.fingerprint, None, os.getcwd(), calls=8)
        await own.ready()
        return await asyncio.gather(*(own.score((view(text),)) for text in MISBEHAVING))

    rewards = [done.results[0].reward for done in asyncio.run(graded())]
    assert rewards == [None if text in DEADLY else len(text) for text in MISBEHAVING]


@pytest.mark.ray
def test_an_item_that_ends_its_node_again_and_again_is_unscored_and_the_others_are_scored(cluster):
    from eval_protocol_rft.scoring.executors._loading import load_evaluator
    from eval_protocol_rft.scoring.executors._ray import MOST_LOSSES, score_items_on_ray
    from tests.data.grading_runs import one_each

    evaluator = load_evaluator(f"{WORK}::bomb_or_length")
    texts = ["bomb", *("x" * i for i in range(1, 20))]
    done = {g.key: g.results[0] for g in score_items_on_ray(one_each(texts), evaluator, workers=1)}
    assert len(done) == len(texts)
    bomb = done.pop("bomb")
    assert bomb.reward is None
    assert f"lost {MOST_LOSSES} times" in bomb.error
    # One beside it may have been on the same nodes each time.
    unlucky = [text for text, result in done.items() if result.reward is None]
    assert len(unlucky) <= 2
    assert all(done[text].reward == len(text) for text in done if text not in unlucky)


@pytest.mark.ray
def test_score_writes_the_rewards_of_the_local_engine(cluster, problems, tmp_path):
    from eval_protocol_rft.data._score import score

    file = tmp_path / "rollouts.parquet"
    generate(problems, file)
    for engine in ("local", "ray"):
        score(file, f"{WORK}::bomb_or_length", name=engine, engine=engine, progress=False)
    for row in rows_of(file).values():
        assert row.scores["reward_ray"] == row.scores["reward_local"]
        assert row.scores["reward_ray"].reward == len(row.response)


@pytest.mark.ray
def test_an_address_where_nobody_listens_is_an_error_at_once():
    pytest.importorskip("ray")
    script = "from tests.data.test_ray import NodeActors; "
    done = subprocess.run(
        [sys.executable, "-c", script + "NodeActors('127.0.0.1:1', lambda node: None).connect()"],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "RayEngineError: there is no Ray cluster at 127.0.0.1:1" in done.stderr


def test_without_ray_the_command_says_what_to_install(problems, tmp_path):
    script = "import sys; sys.modules['ray'] = None; from eval_protocol_rft.cli import app; app()"
    command = ["generate", problems, "-o", tmp_path / "o.parquet", "--model", "local/arithmetic"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--engine", "ray"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'eval-protocol-rft[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_does_not_exist_is_refused(problems, tmp_path):
    with pytest.raises(ValueError, match="engine must be local or ray, got 'spark'"):
        generate(problems, tmp_path / "o.parquet", engine="spark")


def take(actors: NodeActors) -> Any:
    actor = wait_for(actors.free)
    actor.busy += 1
    return actor


def node_of(actor: Any) -> str:
    import ray

    return ray.get(actor.handle.node.remote())


def alive(cluster: Any) -> list[Any]:
    return list(cluster.list_all_nodes())
