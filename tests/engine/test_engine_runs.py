"""Models `vllm/...` in the processor, in a job and in training. A stand-in that samples for real
(`ep-rft serve`) behind vLLM's command line; vLLM itself is in test_real_engine.py."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import urllib.error
import urllib.request

import pytest
from eval_protocol.models import EvaluationRow, Message

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.data._job_settings import model_fingerprint
from eval_protocol_rft.local.engine import VllmOptions, _engine, load_engine, stop_engines
from eval_protocol_rft.local.engine._engine import EngineSampler
from eval_protocol_rft.local.models import bundled_model_path, model_folder_fingerprint
from eval_protocol_rft.loop._run_options import LoopOptions, SetupError
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.rollout._params import ParamsError, parse_completion_params
from eval_protocol_rft.sampling import SamplingParams
from examples.arithmetic import test_arithmetic as example
from tests.engine import stand_in
from tests.loop.runs import options, sums_file
from tests.rollouts import record_of_row, roll_out

HERE = VllmOptions(python=sys.executable)
FOLDER = bundled_model_path("arithmetic")
assert FOLDER is not None


@pytest.fixture(scope="module")
def pids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    stand_in.install(folder / "lib")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stand_in.environment(folder / "lib", folder / "pids", "serve").items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder / "pids"
        stop_engines()


async def test_rows_of_a_test_are_sampled_with_one_engine(pids, tmp_path) -> None:
    processor = FireworksTrainingRolloutProcessor(vllm=HERE)
    params = {"model": "vllm/arithmetic", "n": 3, "max_tokens": 6, "temperature": 0.7}
    rows = [
        EvaluationRow(messages=[Message(role="user", content=f"{i}7+25=")]) for i in range(1, 5)
    ]
    done = await roll_out(processor, rows, params)
    records = [record_of_row(row) for row in done]
    assert [len(record) for record in records] == [3] * 4
    assert not any(record.failures for record in records)
    for record in records:
        assert record.sampling.model == "vllm/arithmetic"
        # vLLM draws seeded requests one by one.
        assert record.sampling.seeds is None or not any(record.sampling.seeds)
    assert len(stand_in.processes(pids)) == 2  # a server and its core

    # A job of the same process and model has the same engine.
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(20, 24)))
    job = {"model": "vllm/arithmetic", "n": 2, "max_tokens": 6}
    done_before = await agenerate(data, tmp_path / "out.parquet", job, vllm=HERE, progress=False)
    assert (done_before.total, done_before.failed) == (8, 0)
    assert len(stand_in.processes(pids)) == 2
    written = RolloutDataset(tmp_path / "out.parquet")
    assert {row.error for row in written} == {None}
    assert model_fingerprint("vllm/arithmetic") == model_folder_fingerprint(FOLDER)


async def test_nobody_without_the_key_reaches_anything_of_an_engine(pids, monkeypatch) -> None:
    engine = load_engine("vllm/arithmetic", options=HERE)
    await asyncio.wrap_future(engine.ready)
    root = engine.endpoint.base_url.removesuffix("/v1")
    for path in ("/v1/models", "/collective_rpc", "/update_weight_version", "/metrics", "/nothing"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(urllib.request.urlopen, root + path)
    shown = stand_in.command_line(stand_in.processes(pids)[0])
    assert engine.endpoint.api_key not in shown
    assert engine.endpoint.api_key not in repr(engine.endpoint)
    # A proxy would look for 127.0.0.1 on itself.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    sampler = EngineSampler(engine)
    params = SamplingParams(model="vllm/arithmetic", max_tokens=4)
    completion = await sampler.sample([4, 5, 6], params)
    await sampler.aclose()
    assert completion.token_ids


async def test_training_gives_an_engine_of_its_own_the_weights_in_place(pids, tmp_path) -> None:
    before = len(stand_in.processes(pids))
    parts = LocalParts(sampler="vllm", vllm=HERE)
    result = await atrain(
        example.test_arithmetic,
        tmp_path / "run",
        model="local/arithmetic",
        data=[sums_file(tmp_path / "sums.jsonl")],
        options=options(steps=2, eval_every=0),
        held_out=2,
        parts=parts,
        progress=False,
    )
    assert [line["staleness"] for line in result.steps] == [{"0": 4}] * 2
    assert max(line["mismatch_k3"] for line in result.steps) < 1e-8
    assert not any(map(stand_in.is_alive, stand_in.processes(pids)[before:]))
    slept = pids.with_suffix(".sleeps").read_text().split()
    assert slept == ["/sleep", "/wake_up", "/wake_up"] * 2
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["sampler"] == "vllm"
    assert not _engine._RUNNING.keys() - {e.endpoint for e in _engine._LOADED.values()}


async def test_sampler_and_model_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SetupError, match="--sampler vllm is for a model of this machine"):
        await LocalParts(sampler="vllm").make(
            lambda row: row,
            {"model": "qwen", "base_url": "http://127.0.0.1:9"},
            LoopOptions(steps=1),
        )
    with pytest.raises(ParamsError, match=r"'api_base'.*sampled with an engine of this process"):
        parse_completion_params({"model": "vllm/a", "api_base": "http://127.0.0.1:9"})
    with pytest.raises(ParamsError, match="started with processed_logprobs"):
        parse_completion_params({"model": "vllm/a", "logprobs_mode": "raw_logprobs"})


async def test_a_finished_job_starts_no_engine(pids, tmp_path) -> None:
    data, out = tmp_path / "sums.jsonl", tmp_path / "out.parquet"
    data.write_text('{"prompt": "1+1="}\n')
    job = {"model": "vllm/arithmetic", "n": 2, "temperature": 0.7, "max_tokens": 4}
    await agenerate(data, out, job, vllm=HERE, progress=False)
    stop_engines()
    before = len(stand_in.processes(pids))
    again = await agenerate(data, out, job, vllm=HERE, progress=False)
    assert (again.total, again.run.completions) == (2, 0)
    assert len(stand_in.processes(pids)) == before


async def test_what_is_wrong_with_a_job_is_told_before_an_engine_starts(pids, tmp_path) -> None:
    before = len(stand_in.processes(pids))
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1+1="}\n')
    out = tmp_path / "out.parquet"
    out.write_text("not ours")
    with pytest.raises(ValueError, match=r"out\.parquet"):
        await agenerate(data, out, {"model": "vllm/arithmetic"}, vllm=HERE, progress=False)
    await asyncio.sleep(0)
    assert len(stand_in.processes(pids)) == before
