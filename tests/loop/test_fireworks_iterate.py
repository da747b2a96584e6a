"""The iterative loop of the control plane, end to end: real client, real server, real training."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fireworks", reason="needs the extra `fireworks`")

from eval_protocol_rft.loop.fireworks._iterate import StepReport  # noqa: E402
from eval_protocol_rft.loop.service.control._datasets import Datasets  # noqa: E402
from tests.faulty_service import FaultyService, faulty_service  # noqa: E402
from tests.service import BASE, KEY, arithmetic_base  # noqa: E402
from tests.sums_run import run_sums, sums  # noqa: E402

STEPS, ROWS, N = 3, 12, 8
DEPLOYMENT = "accounts/acc/deployments/dep"


class Finished(NamedTuple):
    server: FaultyService
    reports: list[StepReport]
    folder: Path
    trained: list[list[dict[str, Any]]]
    """The rows of every step's data set, as the server read them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Three steps, begun from nothing."""
    folder, trained = tmp_path_factory.mktemp("run"), []
    read = Datasets.lines

    def noting(datasets: Datasets, name: str) -> list[dict[str, Any]]:
        trained.append(read(datasets, name))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Datasets, "lines", noting)
        with faulty_service(tmp_path_factory.mktemp("state")) as server:
            reports = asyncio.run(run_sums(server.url, folder, rows=ROWS, n=N, steps=STEPS))
            yield Finished(server, reports, folder, trained)


@torch.no_grad()
def right_answer_probability(model: Any) -> float:
    """What an answer at temperature 1 scores on average, read off the model: nothing is sampled."""
    tokenizer: Any = arithmetic_base().tokenizer
    total = 0.0
    for row in sums(ROWS):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.messages[0].content}],
            add_generation_prompt=True,
            return_dict=False,
        )
        answer = tokenizer.encode(f"{row.ground_truth}{tokenizer.eos_token}")
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total += float(logprobs.gather(-1, torch.tensor(answer)[:, None]).sum().exp())
    return total / ROWS


def test_the_score_rises_step_by_step(finished: Finished) -> None:
    service = finished.server.service
    made = [row["_weights"] for row in finished.server.rows("models")]
    models = [arithmetic_base().module, *(service.weights.module(weights) for weights in made)]
    expected = [right_answer_probability(model) for model in models]
    assert expected == sorted(expected)
    assert expected[-1] > expected[0] + 0.08
    # What was sampled in each step is what the model before it scores, up to chance.
    scores = [report.mean_score for report in finished.reports]
    assert scores == pytest.approx(expected[:-1], abs=0.12)
    assert scores[-1] > scores[0]


def test_every_step_samples_from_the_model_of_the_step_before(finished: Finished) -> None:
    models = [f"accounts/acc/models/sums-step{step}" for step in range(STEPS)]
    assert [report.output_model for report in finished.reports] == models
    sampled = [report.model for report in finished.reports]
    assert sampled == [DEPLOYMENT, *(f"{model}#{DEPLOYMENT}" for model in models[:-1])]
    starts = [
        (job["trainingConfig"].get("baseModel"), job["trainingConfig"].get("warmStartFrom"))
        for job in finished.server.rows("rlorTrainerJobs")
    ]
    assert starts == [(BASE, None), (None, models[0]), (None, models[1])]
    # However long the chain, the base model is the one that is deployed.
    roots = {row["peftDetails"]["baseModel"] for row in finished.server.rows("models")}
    assert roots == {BASE}


def test_a_job_is_asked_for_in_the_words_of_the_service(finished: Finished) -> None:
    job = finished.server.rows("rlorTrainerJobs")[1]
    asked = ("dataset", "rewardWeights", "nodeCount", "lossConfig", "trainingConfig")
    assert {key: job[key] for key in asked} == {
        "dataset": "accounts/acc/datasets/sums-step1",
        "rewardWeights": ["score=1.0"],
        "nodeCount": 1,
        "lossConfig": {"method": "GRPO"},
        "trainingConfig": {
            "warmStartFrom": "accounts/acc/models/sums-step0",
            "outputModel": "accounts/acc/models/sums-step1",
            "epochs": 4,
            "learningRate": 5e-4,
            "loraRank": 8,
        },
    }


def test_every_completion_reaches_the_job_with_its_own_score(finished: Finished) -> None:
    answers = {row.messages[0].content: row.ground_truth for row in sums(ROWS)}
    for rows, report in zip(finished.trained, finished.reports, strict=True):
        assert [len(row["samples"]) for row in rows] == [N] * ROWS
        for row in rows:
            for sample in row["samples"]:
                question, answer = sample["messages"]
                right = answer["content"].strip() == answers[question["content"]]
                assert sample["evals"] == {"score": float(right)}
        scores = [s["evals"]["score"] for row in rows for s in row["samples"]]
        assert report.mean_score == pytest.approx(sum(scores) / len(scores))
        assert (report.groups, report.completions, report.dropped) == (ROWS, ROWS * N, {})


def test_steps_do_not_share_their_random_numbers(finished: Finished) -> None:
    first, second, _ = (
        [sample["messages"][-1]["content"] for row in rows for sample in row["samples"]]
        for rows in finished.trained
    )
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert same < len(first) / 2


def test_nothing_is_left_behind_but_models_and_the_deployment(finished: Finished) -> None:
    assert finished.server.rows("datasets") == []
    assert finished.server.ids("models") == [f"sums-step{step}" for step in range(STEPS)]
    assert [d["model"] for d in finished.server.rows("deployedModels")] == [
        "accounts/acc/models/sums-step1"
    ]
    files = "".join(path.read_text() for path in finished.folder.iterdir())
    assert KEY not in files


def test_a_finished_run_asks_for_nothing_and_goes_on_when_more_steps_are_wanted(
    tmp_path: Path,
) -> None:
    with faulty_service(tmp_path / "state") as server:
        run = tmp_path / "run"
        first = asyncio.run(run_sums(server.url, run, rows=2, n=2, steps=1))
        server.faults.log.clear()
        again = asyncio.run(run_sums(server.url, run, rows=2, n=2, steps=1))
        assert (again, server.faults.log) == (first, [])
        more = asyncio.run(run_sums(server.url, run, rows=2, n=2, steps=2))
        assert more[:1] == first
        assert len(more) == len(server.rows("rlorTrainerJobs")) == 2
