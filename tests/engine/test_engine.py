"""An engine as its process sees it: started, waited for, sampled from, told apart from others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from eval_protocol_rft.data._generate import agenerate
from eval_protocol_rft.local import LocalSampler, Placement, local_model_folder
from eval_protocol_rft.local.engine import VllmOptions, load_engine, stop_engines
from eval_protocol_rft.local.engine._command import Installed, command_line, dtype_of, environment
from eval_protocol_rft.local.engine._engine import EngineSampler, _reasons
from eval_protocol_rft.sampling import RefusedError, RunStoppedError, SamplingParams
from tests.engine import stand_in
from tests.waiting import until, wait_until

HERE = VllmOptions(python=sys.executable)
PARAMS = SamplingParams(model="vllm/arithmetic", max_tokens=4)


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """Engines are stand-ins that name their model and nothing more."""
    stand_in.install(tmp_path / "lib")
    file = tmp_path / "pids"
    for name, value in stand_in.environment(tmp_path / "lib", file, "bare").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield file
    stop_engines()


def test_runs_of_a_process_share_an_engine_and_other_options_have_another(pids) -> None:
    engine = load_engine("vllm/arithmetic", options=HERE)
    assert load_engine("vllm/arithmetic", options=HERE) is engine
    other = load_engine(
        "vllm/arithmetic", options=VllmOptions(python=sys.executable, max_model_len=9)
    )
    assert other.endpoint != engine.endpoint
    assert other.endpoint.api_key != engine.endpoint.api_key
    other.ready.result()
    engine.ready.result()
    stop_engines()
    assert not any(map(stand_in.is_alive, stand_in.processes(pids)))
    assert not engine.folder.exists()
    assert "was stopped" in str(engine.problem())
    again = load_engine("vllm/arithmetic", options=HERE)
    assert again is not engine
    again.ready.result()


def test_an_engine_that_ends_stops_the_run_at_once_and_says_why(pids) -> None:
    engine = load_engine("vllm/arithmetic", options=HERE)
    engine.ready.result()
    server, _ = stand_in.processes(pids)
    os.kill(server, signal.SIGKILL)

    async def sample() -> None:
        sampler = EngineSampler(engine)
        with pytest.raises(RunStoppedError, match="killed by signal 9 for vllm/arithmetic"):
            await sampler.sample([1], PARAMS)
        await sampler.aclose()

    wait_until(lambda: engine.problem() is not None)
    asyncio.run(sample())
    # Who asks for the model then gets another engine.
    assert load_engine("vllm/arithmetic", options=HERE) is not engine


async def test_a_job_whose_engine_dies_says_why_and_the_same_command_goes_on(
    pids, tmp_path
) -> None:
    engine = await asyncio.to_thread(load_engine, "vllm/arithmetic", options=HERE)
    await asyncio.wrap_future(engine.ready)
    os.kill(stand_in.processes(pids)[0], signal.SIGKILL)
    await until(lambda: engine.problem() is not None)
    data, out = tmp_path / "sums.jsonl", tmp_path / "out.parquet"
    data.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(30)))
    job = {"model": "vllm/arithmetic", "n": 2, "max_tokens": 4}
    tokenizer = "local/arithmetic"
    with pytest.raises(RunStoppedError, match="killed by signal 9"):
        await agenerate(
            data, out, job, sampler=EngineSampler(engine), tokenizer=tokenizer, progress=False
        )
    own = LocalSampler.from_pretrained(local_model_folder("arithmetic"))
    done = await agenerate(data, out, job, sampler=own, tokenizer=tokenizer, progress=False)
    assert (done.total, done.failed) == (60, 0)


async def test_who_gives_up_waiting_takes_the_engine_from_nobody(pids) -> None:
    engine = await asyncio.to_thread(load_engine, "vllm/arithmetic", options=HERE)
    waits = [asyncio.ensure_future(asyncio.wrap_future(engine.ready)) for _ in range(2)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await waits[1]
    assert waits[0].cancelled()
    assert engine.problem() is None


def test_what_vllm_says_when_it_fails_is_the_error(pids, monkeypatch) -> None:
    monkeypatch.setenv("STAND_IN", "broken")
    engine = load_engine("vllm/arithmetic", options=HERE)
    with pytest.raises(
        RunStoppedError, match=r"ended \(1\).*: ValueError: head_dim 20 is not"
    ) as told:
        engine.ready.result()
    assert "See root cause above" not in str(told.value)
    assert engine.log.exists()
    assert str(engine.log) in str(told.value)
    assert not any(map(stand_in.is_alive, stand_in.processes(pids)))


def test_without_vllm_it_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(
        RefusedError, match=r"pip install 'eval-protocol-rft\[vllm\]'.*--vllm-python"
    ):
        load_engine("vllm/arithmetic", options=HERE)
    with pytest.raises(RefusedError, match="/nowhere/python is no Python interpreter"):
        load_engine("vllm/arithmetic", options=VllmOptions(python="/nowhere/python"))


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path) -> None:
    for name in ("nothing", str(tmp_path), "a/b/c"):
        with pytest.raises(RefusedError, match=r"vllm/.*(no such folder|no config.json)"):
            load_engine(f"vllm/{name}", options=HERE)


def test_its_port_is_nobody_elses_before_it_listens(pids) -> None:
    engine = load_engine("vllm/arithmetic", options=HERE)
    number = int(engine.endpoint.base_url.rpartition(":")[2].removesuffix("/v1"))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", number))
    engine.ready.result()


GPU = Installed("python", "1", is_cpu=False)
CPU = Installed("python", "1", is_cpu=True)


def line(vllm: Installed, *, options: VllmOptions = HERE, **more) -> list[str]:
    more.setdefault("dtype", "bfloat16")
    return command_line(vllm, "/model", "m", port=1, middleware="a.B", options=options, **more)


def test_its_logprobs_are_those_of_sampling_and_its_folder_does_not_say_how_to_sample() -> None:
    flags = line(GPU)
    assert "--logprobs-mode=processed_logprobs" in flags
    assert "--generation-config=vllm" in flags
    assert "--host=127.0.0.1" in flags
    assert "--dtype=bfloat16" in flags
    # As a trainer has them, whatever the layers compute in.
    assert '--hf-overrides={"head_dtype": "float32"}' in flags
    assert not [f for f in line(GPU, dtype="float32") if "overrides" in f]
    seeds = {next(f for f in line(GPU) if f.startswith("--seed=")) for _ in range(4)}
    assert len(seeds) == 4


def test_memory_is_split_with_a_trainer_and_a_cpu_has_a_cache_of_its_own() -> None:
    assert not [f for f in line(GPU) if "memory" in f]
    assert "--gpu-memory-utilization=0.4" in line(GPU, trains_beside=True)
    own = VllmOptions(gpu_memory_utilization=0.7)
    assert "--gpu-memory-utilization=0.7" in line(GPU, options=own, trains_beside=True)
    assert [f for f in line(CPU) if "memory" in f] == [f"--kv-cache-memory-bytes={1 << 30}"]


def test_it_computes_in_what_a_trainer_of_the_same_placement_does(tmp_path) -> None:
    def dtype(vllm: Installed, weights: str, **placement) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"dtype": weights}))
        return dtype_of(vllm, str(tmp_path), Placement(**placement))

    # Of itself vLLM would take float16 for both.
    assert dtype(GPU, "float32") == "float32"
    assert dtype(GPU, "float16") == "bfloat16"
    assert dtype(GPU, "bfloat16") == "bfloat16"
    assert dtype(GPU, "float32", dtype="bfloat16", device="cuda:1") == "bfloat16"
    assert dtype(CPU, "bfloat16", device="cpu") == "float32"
    assert dtype_of(GPU, "Qwen/Qwen3-0.6B", Placement()) == "auto"
    with pytest.raises(RefusedError, match=r"device cuda: .* built for the CPU alone"):
        dtype(CPU, "float32", device="cuda")
    with pytest.raises(RefusedError, match=r"device cpu: .* built for GPUs"):
        dtype(GPU, "float32", device="cpu")


def test_what_the_user_says_comes_last() -> None:
    assert line(GPU, options=VllmOptions(args=("--dtype=half",)))[-1] == "--dtype=half"


def test_its_environment_has_the_key_and_one_gpu() -> None:
    second = Placement(device="cuda:1", deterministic=True)
    env = environment("k", modules=Path("/m"), takes_weights=False, placement=second, env={})
    assert env["VLLM_API_KEY"] == "k"
    assert env["VLLM_BATCH_INVARIANT"] == "1"
    assert env["VLLM_SERVER_DEV_MODE"] == "0"
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    seen = {"CUDA_VISIBLE_DEVICES": "4,6", "PYTHONPATH": "/mine"}
    env = environment("k", modules=Path("/m"), takes_weights=True, placement=second, env=seen)
    assert env["CUDA_VISIBLE_DEVICES"] == "6"
    assert env["PYTHONPATH"] == "/m:/mine"
    assert env["VLLM_SERVER_DEV_MODE"] == "1"


def test_first_errors_of_a_log_are_its_reason() -> None:
    log = (
        "(APIServer pid=1) INFO 11-30 21:31:45 [launcher.py:195] Route: /error, Methods: POST\n"
        "\x1b[0;36m(EngineCore pid=2)\x1b[0;0m ERROR 11-30 21:31:45 [core.py:9] "
        "torch.OutOfMemoryError: of 3 GB\n"
        "(EngineCore pid=2) ERROR 11-30 21:31:45 [core.py:9] torch.OutOfMemoryError: of 3 GB\n"
        "  Value error, no such thing [type=value_error]\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    said = _reasons(log)
    assert said == "torch.OutOfMemoryError: of 3 GB / Value error, no such thing [type=value_error]"
