"""Real evaluation tests in every mode of Eval Protocol, on one processor. `test_ep_modes.py` runs
this file with pytest in a process of its own; by its name it is not collected otherwise."""

import json
import os
from pathlib import Path

from eval_protocol.dataset_logger.dataset_logger import DatasetLogger
from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message
from eval_protocol.pytest import evaluation_test
from eval_protocol.pytest.exception_config import BackoffConfig, ExceptionHandlerConfig

from eval_protocol_rft import FireworksTrainingRolloutProcessor, score_each_completion
from eval_protocol_rft.rollout._processor import RolloutError

OUTPUT = Path(os.environ["EP_MODES_OUTPUT"])
SHARED = {
    "api_base": os.environ["EP_MODES_SERVER"],
    "max_tokens": 32,
    "tokenizer": os.environ["EP_MODES_TOKENIZER"],
}
COMPLETION_PARAMS = [
    {**SHARED, "model": "case-a", "n": 4, "seed": 1},
    {**SHARED, "model": "case-b", "n": 2, "seed": 2, "temperature": 0.5},
]
ONE_OF_EACH = [
    {**SHARED, "model": "case-c", "seed": 3},
    {**SHARED, "model": "case-d", "seed": 4, "temperature": 0.5},
]
"""For groups, which have one row per set: more completions of each cannot be told apart there."""
HISTORY = [
    Message(role="user", content="hi"),
    Message(role="assistant", content="hello"),
    Message(role="user", content="bye"),
]
ROWS = [
    EvaluationRow(messages=messages, input_metadata=InputMetadata(row_id=f"row-{i}"))
    for i, messages in enumerate(
        ([Message(role="user", content="one")], [Message(role="user", content="two")], HISTORY)
    )
]
REFUSED_AT_FIRST = EvaluationRow(
    messages=[Message(role="user", content="refused at first")],
    input_metadata=InputMetadata(row_id="row-again"),
)


class Lines(DatasetLogger):
    """Every logged state of a row, a line each, in a file per process."""

    def log(self, row: EvaluationRow) -> None:
        with (OUTPUT / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(row.model_dump(mode="json")) + "\n")

    def read(self, row_id: str | None = None) -> list[EvaluationRow]:
        return []


processor = FireworksTrainingRolloutProcessor()


def case(mode: str, num_runs: int, *more_rows: EvaluationRow, **options):
    return evaluation_test(
        input_rows=[[*ROWS, *more_rows]],
        completion_params=ONE_OF_EACH if mode == "groupwise" else COMPLETION_PARAMS,
        rollout_processor=processor,
        mode=mode,
        num_runs=num_runs,
        logger=Lines(),
        **options,
    )


def judge(row: EvaluationRow) -> EvaluationRow:
    row.evaluation_result = EvaluateResult(score=float(len(str(row.messages[-1].content))))
    return row


@case("pointwise", 1)
@score_each_completion
def test_pointwise_1(row: EvaluationRow) -> EvaluationRow:
    return judge(row)


@case("pointwise", 3)
@score_each_completion
async def test_pointwise_3(row: EvaluationRow) -> EvaluationRow:
    return judge(row)


@case("groupwise", 1)
@score_each_completion
def test_groupwise_1(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [judge(row) for row in rows]


@case("groupwise", 3)
@score_each_completion
async def test_groupwise_3(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [judge(row) for row in rows]


@case("all", 1)
@score_each_completion
def test_all_1(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [judge(row) for row in rows]


@case("all", 3)
@score_each_completion
async def test_all_3(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    return [judge(row) for row in rows]


@case(
    "pointwise",
    2,
    REFUSED_AT_FIRST,
    exception_handler_config=ExceptionHandlerConfig(
        retryable_exceptions={RolloutError},
        backoff_config=BackoffConfig(strategy="constant", base_delay=0.01),
    ),
)
@score_each_completion
def test_retried(row: EvaluationRow) -> EvaluationRow:
    return judge(row)
