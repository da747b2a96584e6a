"""A loop over litellm: python litellm_agent.py [--model openai/policy] [--stream] TASK"""

import argparse
import json

import litellm

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]

parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--model", default="openai/policy")
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

messages = [
    {"role": "system", "content": "You are a calculator."},
    {"role": "user", "content": arguments.task},
]
while True:
    request = {"model": arguments.model, "messages": messages, "tools": TOOLS}
    if arguments.stream:
        chunks = list(litellm.completion(**request, stream=True))
        response = litellm.stream_chunk_builder(chunks, messages=messages)
    else:
        response = litellm.completion(**request)
    message = response.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        numbers = json.loads(call.function.arguments)
        total = numbers["a"] + numbers["b"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})
