#!/bin/sh
# A loop over curl and jq: sh agent.sh TASK
set -eu

tools='[{"type": "function", "function": {"name": "add", "description": "Add two numbers.",
  "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
  "required": ["a", "b"]}}}]'
messages=$(jq -n --arg task "$1" '[{role: "system", content: "You are a calculator."},
  {role: "user", content: $task}]')

while :; do
  message=$(jq -n --argjson messages "$messages" --argjson tools "$tools" \
    '{model: "policy", messages: $messages, tools: $tools}' |
    curl --silent --show-error --fail-with-body --data-binary @- \
      --header "Authorization: Bearer $OPENAI_API_KEY" --header "Content-Type: application/json" \
      "$OPENAI_BASE_URL/chat/completions" | jq '.choices[0].message')
  messages=$(jq -n --argjson messages "$messages" --argjson message "$message" \
    '$messages + [$message]')
  if [ "$(printf %s "$message" | jq '.tool_calls // [] | length')" = 0 ]; then
    printf %s "$message" | jq -r .content
    exit
  fi
  results=$(printf %s "$message" | jq '[.tool_calls[] | {role: "tool", tool_call_id: .id,
    content: (.function.arguments | fromjson | .a + .b | tostring)}]')
  messages=$(jq -n --argjson messages "$messages" --argjson results "$results" \
    '$messages + $results')
done
