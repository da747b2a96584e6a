"""The OpenAI Agents SDK: python openai_agents.py [--api chat] [--team tool] TASK"""

import argparse
import asyncio

from agents import Agent, Runner, function_tool, set_default_openai_api
from pydantic import BaseModel


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Sum(BaseModel):
    total: int


def calculator(**fields) -> Agent:
    return Agent(
        name="Calculator",
        instructions="You are a calculator.",
        model="policy",
        tools=[add],
        handoff_description="Adds numbers.",
        **fields,
    )


def team(kind: str) -> Agent:
    if kind == "none":
        return calculator()
    if kind == "typed":
        return calculator(output_type=Sum)
    clerk = {"name": "Clerk", "instructions": "You are a clerk.", "model": "policy"}
    if kind == "handoff":
        return Agent(**clerk, handoffs=[calculator()])
    tool = calculator().as_tool(tool_name="calculate", tool_description="Works out a sum.")
    return Agent(**clerk, tools=[tool])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--api", choices=["chat", "responses"], default="responses")
    parser.add_argument("--team", choices=["none", "typed", "tool", "handoff"], default="none")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    if arguments.api == "chat":
        set_default_openai_api("chat_completions")
    agent = team(arguments.team)
    if arguments.stream:
        result = Runner.run_streamed(agent, arguments.task)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, arguments.task)
    print(result.final_output)


asyncio.run(main())
