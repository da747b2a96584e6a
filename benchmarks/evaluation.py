"""A real `@evaluation_test` under pytest, in a process of its own: once to warm up, once timed.

Run by rollouts.py as `pytest benchmarks/evaluation.py` with ROLLOUT_PEER (ours, client or canned),
ROLLOUT_WORKLOAD, ROLLOUT_URL and ROLLOUT_RESULT set. Everything that is loaded once (imports,
tokenizer, the lazy parts of Eval Protocol) is loaded before the clock starts. No postponed
annotations here: Eval Protocol reads the evaluator's.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from processors import CannedProcessor, ClientProcessor
from workload import WARM_UP_ROWS, Meter, Workload

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local._tokenizer import load_tokenizer

WORKLOAD = Workload.load(os.environ["ROLLOUT_WORKLOAD"])
TOKENIZER = load_tokenizer(WORKLOAD.tokenizer)
PROCESSORS = {
    "ours": FireworksTrainingRolloutProcessor,
    "client": lambda: ClientProcessor(TOKENIZER.tokenizer),
    "canned": lambda: CannedProcessor(WORKLOAD),
}
PROCESSOR: RolloutProcessor = PROCESSORS[os.environ["ROLLOUT_PEER"]]()
PARAMS = {
    "model": "accounts/benchmark/models/stub",
    "api_base": os.environ["ROLLOUT_URL"],
    "api_key": "none",
    "tokenizer": WORKLOAD.tokenizer,
    "n": WORKLOAD.n,
    "temperature": 1.0,
    "max_tokens": WORKLOAD.max_tokens,
    "seed": 0,
}
ROWS = [
    EvaluationRow(messages=[Message(role="user", content=question)])
    for question in WORKLOAD.questions
]
SEEN: list[EvaluationRow] = []
"""What reached the evaluator."""


@evaluation_test(
    input_rows=[ROWS[:WARM_UP_ROWS]],
    completion_params=[PARAMS],
    rollout_processor=PROCESSOR,
    max_concurrent_rollouts=WORKLOAD.concurrency,
)
def test_warm_up(row: EvaluationRow) -> EvaluationRow:
    row.evaluation_result = EvaluateResult(score=1.0)
    return row


@pytest.fixture
def metered() -> Iterator[None]:
    meter = Meter()
    with meter.running():
        yield
    assert len(SEEN) == len(ROWS) - WARM_UP_ROWS
    assert all(row.rollout_status.is_finished() for row in SEEN), SEEN[0].rollout_status
    extras = [row.execution_metadata.extra or {} for row in SEEN]
    measured = meter.measurement(
        pair
        for extra in extras
        for pair in zip(extra["completion_ids"], extra["inference_logprobs"], strict=True)
    )
    Path(os.environ["ROLLOUT_RESULT"]).write_bytes(msgspec.json.encode(measured))


@pytest.mark.usefixtures("metered")
@evaluation_test(
    input_rows=[ROWS[WARM_UP_ROWS:]],
    completion_params=[PARAMS],
    rollout_processor=PROCESSOR,
    max_concurrent_rollouts=WORKLOAD.concurrency,
)
def test_rollouts(row: EvaluationRow) -> EvaluationRow:
    SEEN.append(row)
    row.evaluation_result = EvaluateResult(score=1.0)
    return row
