"""`train` on Fireworks' training API: the same loop, weights of the local service."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest import SingleTurnRolloutProcessor, evaluation_test

pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop._run_options import Optimizer, SetupError
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.loop.fireworks import _connecting as fireworks
from examples.arithmetic import test_arithmetic as example
from tests.loop.runs import options, sums_file
from tests.service import BASE, KEY
from tests.trainer_service import trainer_service


async def test_a_run_on_fireworks_trains_what_its_deployment_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    with trainer_service() as server:
        # What clients of the inference API alone are given.
        monkeypatch.setenv("FIREWORKS_BASE_URL", f"{server.url}/inference/v1")
        result = await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=6, groups_per_step=8, completions_per_prompt=8),
            completion_params={
                "model": BASE,
                "api_base": "https://api.fireworks.ai/inference/v1",
                "tokenizer": str(bundled_model_path("arithmetic")),
            },
            data=[sums_file(tmp_path / "sums.jsonl")],
            held_out=16,
            progress=False,
            parts=fireworks.FireworksParts(
                base_model=BASE,
                deployment="dep",
                trainer_job="job",
                optimizer=Optimizer(),
            ),
        )
        assert len(server.asked.loads) == 6
    assert len(result.steps) == 6
    assert max(line["mismatch_k3"] for line in result.steps) < 1e-6
    assert max(line["server_loss_difference"] for line in result.steps) < 1e-3
    assert [line["step"] for line in result.evaluations] == [0, 2, 4, 6]
    assert KEY not in (tmp_path / "run" / "settings.json").read_text()
    assert not (tmp_path / "run" / "model").exists()  # the weights are on Fireworks


async def test_a_local_model_is_no_model_on_fireworks(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="name the one on Fireworks"):
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(),
            parts=fireworks.FireworksParts(base_model=BASE, deployment="dep"),
            progress=False,
        )


async def test_nothing_is_started_for_a_test_whose_processor_keeps_no_tokens() -> None:
    def pass_on(row: EvaluationRow) -> EvaluationRow:
        return row

    # Eval Protocol looks at the annotations as they are, and here they are text.
    pass_on.__annotations__ = {"row": EvaluationRow, "return": EvaluationRow}
    test = evaluation_test(
        input_messages=[[[Message(role="user", content="1+2=")]]],
        completion_params=[{"model": BASE}],
        rollout_processor=SingleTurnRolloutProcessor(),
    )(pass_on)
    with trainer_service() as server:
        parts = fireworks.FireworksParts(base_model=BASE, deployment="dep", base_url=server.url)
        params = {"model": BASE, "api_base": server.url}
        with pytest.raises(SetupError, match="SingleTurnRolloutProcessor, which keeps no tokens"):
            await parts.make(test, params, options())
        assert not server.called("create_model")
