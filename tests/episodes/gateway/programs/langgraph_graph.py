"""A LangGraph graph of a model node and a tool node: python langgraph_graph.py TASK"""

import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


model = ChatOpenAI(model="policy").bind_tools([add])


def call_model(state: MessagesState) -> dict:
    system = SystemMessage("You are a calculator.")
    return {"messages": [model.invoke([system, *state["messages"]])]}


builder = StateGraph(MessagesState)
builder.add_node("model", call_model)
builder.add_node("tools", ToolNode([add]))
builder.add_edge(START, "model")
builder.add_conditional_edges("model", tools_condition)
builder.add_edge("tools", "model")
graph = builder.compile()
print(graph.invoke({"messages": [HumanMessage(sys.argv[1])]})["messages"][-1].text)
