"""smolagents: python smolagents_agent.py [--code] TASK"""

import argparse
import os

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first one
        b: the second one
    """
    return a + b


parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--code", action="store_true")
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

model = OpenAIModel(
    model_id="policy",
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
)
kind = CodeAgent if arguments.code else ToolCallingAgent
agent = kind(tools=[add], model=model, verbosity_level=0, stream_outputs=arguments.stream)
print(agent.run(arguments.task))
