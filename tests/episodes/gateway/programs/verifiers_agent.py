"""verifiers, its own chat program with a task's tools: python verifiers_agent.py TASK"""

import asyncio
import os
import sys

import verifiers.v1 as vf
from verifiers_adder import SumTask, SumTaskConfig


async def main() -> None:
    config = vf.AgentConfig(
        model="policy",
        client=vf.EvalClientConfig(
            base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY"
        ),
        harness={"id": "null"},
        runtime=vf.SubprocessConfig(),
    )
    data = vf.TaskData(prompt=sys.argv[1], system_prompt="You are a calculator.")
    async with vf.make_agent(config) as agent:
        trace = await agent.run(SumTask(data, SumTaskConfig()))
    print(trace.last_reply)
    for error in trace.errors:
        print(error, file=sys.stderr)


asyncio.run(main())
