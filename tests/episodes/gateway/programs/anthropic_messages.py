"""A loop over Anthropic's Messages: python anthropic_messages.py [--stream] TASK"""

import argparse

from anthropic import Anthropic

TOOLS = [
    {
        "name": "add",
        "description": "Add two numbers.",
        "input_schema": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
]

parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

client = Anthropic()
messages = [{"role": "user", "content": arguments.task}]
while True:
    request = {
        "model": "policy",
        "max_tokens": 1000,
        "system": "You are a calculator.",
        "messages": messages,
        "tools": TOOLS,
    }
    if arguments.stream:
        with client.messages.stream(**request) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**request)
    messages.append({"role": "assistant", "content": message.content})
    if message.stop_reason != "tool_use":
        print("".join(block.text for block in message.content if block.type == "text"))
        break
    results = [
        {
            "type": "tool_result",
            "tool_use_id": block.id,
            "content": str(block.input["a"] + block.input["b"]),
        }
        for block in message.content
        if block.type == "tool_use"
    ]
    messages.append({"role": "user", "content": results})
