"""LangChain's agent, a LangGraph graph: python langchain_agent.py [--api chat] [--stream] TASK"""

import argparse

from langchain.agents import create_agent


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def model_of(api: str):
    if api == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(model="policy")
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="policy", use_responses_api=api == "responses")


parser = argparse.ArgumentParser()
parser.add_argument("task")
parser.add_argument("--api", choices=["chat", "responses", "anthropic"], default="chat")
parser.add_argument("--stream", action="store_true")
arguments = parser.parse_args()

agent = create_agent(
    model=model_of(arguments.api), tools=[add], system_prompt="You are a calculator."
)
state = {"messages": [{"role": "user", "content": arguments.task}]}
if arguments.stream:
    for mode, part in agent.stream(state, stream_mode=["messages", "values"]):
        if mode == "values":
            state = part
else:
    state = agent.invoke(state)
print(state["messages"][-1].text)
