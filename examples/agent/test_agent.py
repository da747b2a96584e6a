r"""The agent in `second_try.py`, as it is, learns to add (pip install openai-agents 'openai<3'):

    ep-rft train examples/agent/test_agent.py::test_agent --held-out 64 --steps 120 --lr 5e-4 \
        --groups-per-step 16 --warmup-steps 10 --schedule linear --max-staleness 1 -o run

All that it is told of this run is a client with another base URL and key.
"""

from agents import OpenAIProvider, RunConfig
from eval_protocol.data_loader import DynamicDataLoader
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from second_try import solve

from eval_protocol_rft import AgentRolloutProcessor, SlimLogger, score_each_completion
from eval_protocol_rft.episodes.gateway import Session


def sums() -> list[EvaluationRow]:
    return [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+{b}=")], ground_truth=str(a + b))
        for a in range(10, 100)
        for b in range(10, 100)
    ]


async def play(row: EvaluationRow, session: Session) -> None:
    provider = OpenAIProvider(openai_client=session.openai(), use_responses=False)
    config = RunConfig(model_provider=provider, tracing_disabled=True)
    await solve(row.messages[0].content, row.ground_truth, config)


@evaluation_test(
    data_loaders=DynamicDataLoader(generators=[sums]),
    completion_params=[{"model": "local/arithmetic", "n": 8, "temperature": 1.0, "max_tokens": 8}],
    rollout_processor=AgentRolloutProcessor(play),
    logger=SlimLogger(),
)
@score_each_completion
def test_agent(row: EvaluationRow) -> EvaluationRow:
    answer = str(row.messages[-1].content).strip()
    row.evaluation_result = EvaluateResult(score=float(answer == row.ground_truth))
    return row
