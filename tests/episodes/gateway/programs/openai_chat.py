"""A loop over Chat Completions: python openai_chat.py [--stream] TASK"""

import argparse
import json

from openai import OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState

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
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

client = OpenAI()
messages = [
    {"role": "system", "content": "You are a calculator."},
    {"role": "user", "content": arguments.task},
]
while True:
    if arguments.stream:
        state = ChatCompletionStreamState(input_tools=TOOLS)
        for chunk in client.chat.completions.create(
            model="policy", messages=messages, tools=TOOLS, stream=True
        ):
            state.handle_chunk(chunk)
        completion = state.get_final_completion()
    else:
        completion = client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
    message = completion.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        numbers = json.loads(call.function.arguments)
        total = numbers["a"] + numbers["b"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})
