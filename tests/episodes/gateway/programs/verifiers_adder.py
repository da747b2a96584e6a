"""A task of verifiers with a tool, which it serves from here: python -m verifiers_adder"""

import verifiers.v1 as vf


class Adder(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b


class SumTaskConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class SumTask(vf.Task[vf.TaskData, vf.State, SumTaskConfig]):
    @classmethod
    def toolsets(cls, config: SumTaskConfig) -> list[vf.Toolset]:
        return [Adder(config.tools)]

    @vf.reward
    async def answered(self, trace: vf.Trace) -> float:
        return float("44" in (trace.last_reply or ""))


if __name__ == "__main__":
    Adder.run()
