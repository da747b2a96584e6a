"""Tools of an MCP server: `pytest examples/mcp_tools`.

A script stands in for a model that calls tools; to train one behind a server, leave out `sampler=`
and name it in `completion_params`.
"""

import sys
from pathlib import Path

from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from guesser import Guesser

from eval_protocol_rft import EpisodeRolloutProcessor, score_each_completion
from eval_protocol_rft.episodes import McpServers, ToolLoop

SERVER = {"command": sys.executable, "args": [str(Path(__file__).with_name("server.py"))]}
SERVERS = McpServers({"mcpServers": {"calculator": SERVER}})  # one for all episodes


@evaluation_test(
    input_messages=[[[Message(role="user", content=f"{a} plus {a}?")] for a in (12, 34)]],
    completion_params=[{"model": "local/arithmetic", "n": 4, "max_tokens": 200}],
    rollout_processor=EpisodeRolloutProcessor(lambda: ToolLoop(mcp=SERVERS), sampler=Guesser()),
)
@score_each_completion
def test_mcp(row: EvaluationRow) -> EvaluationRow:
    right = 2 * int(str(row.messages[0].content)[:2])
    row.evaluation_result = EvaluateResult(score=float(row.messages[-1].content == str(right)))
    return row
