"""Pydantic AI: python pydantic_ai_agent.py [--model openai-chat:policy] [--output tool] TASK"""

import argparse
import asyncio

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput


class Sum(BaseModel):
    total: int


OUTPUTS = {"text": str, "tool": Sum, "native": NativeOutput(Sum)}

parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--model", default="openai-chat:policy")
parser.add_argument("--output", choices=OUTPUTS, default="text")
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

agent = Agent(
    arguments.model, instructions="You are a calculator.", output_type=OUTPUTS[arguments.output]
)


@agent.tool_plain
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def watch(context, events) -> None:
    async for _ in events:
        pass


async def main() -> None:
    handler = watch if arguments.stream else None
    result = await agent.run(arguments.task, event_stream_handler=handler)
    print(result.output.total if isinstance(result.output, Sum) else result.output)


asyncio.run(main())
