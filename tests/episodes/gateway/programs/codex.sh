#!/bin/sh
# OpenAI's Codex without a terminal, with the tools that it runs itself: sh codex.sh TASK
set -eu

CODEX_HOME=$(mktemp -d "$PWD/codex.XXXX")
export CODEX_HOME
exec codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox \
  -c model=policy -c model_provider=here -c web_search=disabled --disable multi_agent \
  -c "model_providers.here={name=\"here\", base_url=\"$OPENAI_BASE_URL\", env_key=\"OPENAI_API_KEY\"}" \
  "$1" </dev/null
