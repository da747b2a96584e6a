"""A loop over Responses: python openai_responses.py [--stream] [--history named] TASK"""

import argparse
import json

from openai import OpenAI

TOOLS = [
    {
        "type": "function",
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
]

parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--stream", action="store_true")
parser.add_argument("--history", choices=["whole", "named", "previous"], default="whole")
arguments = parser.parse_args()

client = OpenAI()
items = [{"role": "user", "content": arguments.task}]
previous = {}
while True:
    request = {
        "model": "policy",
        "instructions": "You are a calculator.",
        "input": items,
        "tools": TOOLS,
        **previous,
    }
    if arguments.stream:
        with client.responses.stream(**request) as stream:
            response = stream.get_final_response()
    else:
        response = client.responses.create(**request)
    if arguments.history == "previous":
        items, previous = [], {"previous_response_id": response.id}
    elif arguments.history == "named":
        items += [{"type": "item_reference", "id": item.id} for item in response.output]
    else:
        items += response.output
    calls = [item for item in response.output if item.type == "function_call"]
    if not calls:
        print(response.output_text)
        break
    for call in calls:
        numbers = json.loads(call.arguments)
        total = numbers["a"] + numbers["b"]
        items.append(
            {"type": "function_call_output", "call_id": call.call_id, "output": str(total)}
        )
