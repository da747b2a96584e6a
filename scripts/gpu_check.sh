#!/usr/bin/env bash
# The tests that need a GPU, then a table in Markdown: tokens a second, sampler against trainer, and
# memory, in float32 and bfloat16. Some five minutes on one large GPU; where there is none the tests
# are skipped, and the table is of the CPU. Arguments go to scripts/gpu_check.py (--help).
#   scripts/gpu_check.sh                      # SmolLM2-135M
#   scripts/gpu_check.sh --model ./qwen3-4b --gradient-checkpointing
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q -m gpu tests/test_gpu.py
python -m scripts.gpu_check "$@"
