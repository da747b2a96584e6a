#!/bin/sh
# mini-SWE-agent in this directory: sh mini_swe_agent.sh TASK
set -eu

export MSWEA_CONFIGURED=true MSWEA_COST_TRACKING=ignore_errors MSWEA_GLOBAL_CONFIG_DIR="$PWD/mini"
exec mini --model openai/policy --yolo --exit-immediately --cost-limit 0 --output "$PWD/run.json" \
  --task "$1"
