#!/bin/sh
# Real agents' clients against the gateway: makes the environments that are missing, runs the tests.
#
#     scripts/clients.sh ~/clients [pytest options]
#
# Needs Python 3.11 or newer, Node 20 or newer with npm, curl and jq. The newest versions are taken;
# empty the folder to take newer ones.
set -eu

[ $# -gt 0 ] || { echo "usage: scripts/clients.sh FOLDER [pytest options]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

environment() {
  name=$1
  shift
  if [ ! -e "$folder/$name/done" ]; then
    [ -e "$folder/$name" ] || python -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$@"
    touch "$folder/$name/done"
  fi
}

environment frameworks openai anthropic litellm openai-agents langgraph langchain langchain-openai \
  langchain-anthropic 'pydantic-ai-slim[openai,anthropic]' 'smolagents[openai]' \
  mini-swe-agent
environment verifiers verifiers uv  # takes openai 2 alone
# The example is trained in this environment and openai-agents, in a version for openai 2, which
# Eval Protocol's litellm wants.
[ -e "$folder/example" ] || python -m venv "$folder/example"
python -c 'import sys; print(*filter(None, sys.path), sep="\n")' \
  >"$(echo "$folder"/example/lib/python3*/site-packages)/this.pth"
environment example openai-agents 'openai<3'
if [ ! -e "$folder/node/node_modules/openai" ]; then
  mkdir -p "$folder/node"
  npm install --silent --prefix "$folder/node" openai @openai/agents ai @ai-sdk/openai \
    @ai-sdk/anthropic zod @openai/codex
fi

for name in frameworks verifiers; do
  "$folder/$name/bin/pip" list 2>/dev/null |
    grep -E '^(openai|anthropic|litellm|openai-agents|lang(graph|chain)(-openai|-anthropic)?|pydantic-ai-slim|smolagents|mini-swe-agent|verifiers) '
done
npm list --prefix "$folder/node" --depth 0

cd "$(dirname "$0")/.."
EP_RFT_CLIENTS=$folder python -m pytest tests/episodes/gateway/test_real_clients.py "$@"
"$folder/example/bin/python" -m pytest tests/test_agent_example.py "$@"
