#!/bin/sh
# Other trainers' own code reads what is exported for them: makes the environment, runs the tests.
#
#     scripts/trainers.sh ~/trainers [pytest options]
#
# Needs Python 3.12 (as python3.12, or what PYTHON names), git and 8 GB. No GPU. The sources are those
# of the commits in docs/exports.md.
set -eu

[ $# -gt 0 ] || { echo "usage: scripts/trainers.sh FOLDER [pytest options]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
shift

sources() {  # name, repository, commit
  [ -e "$folder/$1/.git/FETCH_HEAD" ] || {
    git init --quiet "$folder/$1"
    git -C "$folder/$1" fetch --quiet --depth 1 "https://github.com/$2" "$3"
  }
  git -C "$folder/$1" checkout --quiet "$3"
}

sources skyrl NovaSky-AI/SkyRL a9564572eb8e91076be43c1bd5e4615e3de17265
sources slime THUDM/slime 624b824a898ab0ec1fcb4d373004c7f3852bf515
sources prime-rl PrimeIntellect-ai/prime-rl 559b44772e471d1538537b8805cc77f3824a5e64
sources areal inclusionAI/AReaL 4aef98d8d818af55b43621aaadba047ae10f4e77
sources nemo-rl NVIDIA-NeMo/RL 7ea279abfbeb698b092856d0dab61e7cf39bc909
sources openrlhf OpenRLHF/OpenRLHF 3c3be6234e0cb353e76bb8019947db9dfe99fca7

# None of them is installed: their dependencies exclude each other. This is what the modules import
# that the tests use; engines and kernels are stood in for.
if [ ! -e "$folder/venv/done" ]; then
  "${PYTHON:-python3.12}" -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.13.0
  "$folder/venv/bin/pip" install --quiet -e "$here[serve]" pytest pytest-asyncio hypothesis \
    transformers==5.8.0 accelerate aiofiles beartype cloudpathlib colorlog datasets einops flask \
    hydra-core jaxtyping lark loguru mlflow-skinny numba nvidia-ml-py omegaconf orjson peft pillow \
    prime-pydantic-config prometheus_client pybase64 pylatexenc pyzmq ray scipy skyrl-gym tabulate \
    tenacity tensorboard tensordict tomli_w torchdata uvloop wandb
  touch "$folder/venv/done"
fi

cd "$here"
EP_RFT_TRAINERS="$folder" exec "$folder/venv/bin/python" -m pytest -m trainers \
  tests/training/test_export_trainers_real.py tests/training/test_export_snippets.py "$@"
