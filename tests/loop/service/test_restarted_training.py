"""A trainer that is started again goes on with what it had, whatever its calls came to before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eval_protocol_rft.loop.service.training._model_in_training import ModelInTraining
from tests.loop.service.test_training import call, new_model, same, wire
from tests.service import RunningService, fireworks_service

DATA = [wire([4, 5, 6, 7], [1.0, -0.5, 0.25])]
OTHER = [wire([9, 8, 7], [0.5, 1.0])]


class Caller:
    """One model in training. Each call has the next number; its answer is waited for."""

    def __init__(self, server: RunningService, **model: Any) -> None:
        self.server = server
        self.model = new_model(server, **model)
        self.seq = 0

    def __call__(self, name: str, **body: Any) -> Any:
        self.seq += 1
        body |= {"model_id": self.model, "seq_id": self.seq}
        answer = call(self.server, "retrieve_future", call(self.server, name, body))
        assert answer.get("type") != "try_again"
        return answer

    def gather(self, data: Any = DATA) -> Any:
        return self(
            "forward_backward", forward_backward_input={"data": data, "loss_fn": "cross_entropy"}
        )

    def step(self, **adam: Any) -> Any:
        return self("optim_step", adam_params={"learning_rate": 0.01, **adam})

    def weights(self) -> dict[str, Tensor]:
        """Those that it has now, as they are sampled with."""
        path = f"weights-{self.seq}"
        assert "error" not in self("save_weights_for_sampler", path=path)
        (row,) = [r for r in self.server.service.store.list("snapshots") if r["identity"] == path][
            -1:
        ]
        return self.server.service.weights.state_dict(row["weights"])


def plain(server: RunningService, *data: Any) -> dict[str, Tensor]:
    """Of a model that took one step on these datums, each once."""
    caller = Caller(server)
    for datums in data:
        caller.gather(datums)
    caller.step()
    return caller.weights()


@pytest.mark.parametrize("until", ["step", "load"])
def test_a_lost_state_is_an_error_and_not_the_base_model(until: str, tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        caller.gather()
        caller.step()
        if until == "load":
            caller("save_weights", path="kept")
            caller("load_weights", path="kept", optimizer=True)
    for file in (tmp_path / "training").glob("session-*.pt"):
        file.unlink()
    with fireworks_service(tmp_path) as server:
        caller.server = server
        assert "any more" in caller.gather()["error"]


@pytest.mark.parametrize("refused", ["step", "load"])
def test_a_refused_call_keeps_the_gradient_for_the_next_start(refused: str, tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        caller.gather()
        if refused == "step":
            assert "beta3" in caller.step(beta3=0.5)["error"]
        else:
            assert "not found" in caller("load_weights", path="nowhere")["error"]
    with fireworks_service(tmp_path) as server:
        caller.server = server
        caller.step()
        assert same(caller.weights(), plain(server, DATA))


@pytest.mark.parametrize("done", [True, False])
def test_a_call_in_which_the_server_failed_is_not_done_at_the_next_start(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it failed before or after its work."""
    original = ModelInTraining.forward_backward

    def failing(self: ModelInTraining, *arguments: Any) -> Any:
        if done:
            original(self, *arguments)
        raise MemoryError("no room")

    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        caller.gather()
        with monkeypatch.context() as patch:
            patch.setattr(ModelInTraining, "forward_backward", failing)
            assert caller.gather(OTHER)["category"] == "server"
        caller.gather(OTHER)
    with fireworks_service(tmp_path) as server:
        caller.server = server
        caller.step()
        assert same(caller.weights(), plain(server, DATA, OTHER))


def test_a_state_that_was_saved_over_is_not_loaded_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # But for the first step, no state is saved to make the way shorter.
    monkeypatch.setattr("eval_protocol_rft.loop.service.training._training._REPLAY_SHARE", 1e9)
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        caller.gather()
        caller.step()
        caller("save_weights", path="last")
        caller("load_weights", path="last", optimizer=True)
        caller.gather(OTHER)
        caller.step()
        caller("save_weights", path="last")
        before = {name: value.clone() for name, value in caller.weights().items()}
    with fireworks_service(tmp_path) as server:
        caller.server = server
        assert same(caller.weights(), before)


def test_what_a_restart_does_not_need_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference model takes no step, and is asked for logprobs as long as a run lasts."""
    monkeypatch.setattr("eval_protocol_rft.loop.service.training._operations.KEPT", 3)
    with fireworks_service(tmp_path) as server:
        caller = Caller(server, base_only=True)
        for _ in range(8):
            caller("forward", forward_input={"data": DATA, "loss_fn": "cross_entropy"})
        with server.service.store.change() as db:
            kept = db.execute("SELECT seq, body FROM operations ORDER BY seq").fetchall()
        assert kept == [(6, None), (7, None), (8, None)]
        # Sent again so late, it would have no answer for ever.
        body = {"forward_input": {"data": DATA, "loss_fn": "cross_entropy"}}
        late = call(server, "forward", {**body, "model_id": caller.model, "seq_id": 2}, 410)
        assert "long ago" in late["message"]


def test_states_of_similar_and_of_long_names_are_each_their_own(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        before = {name: value.clone() for name, value in caller.weights().items()}
        for name in ("step.1", "step_1", "ä" * 200):
            assert "error" not in caller("save_weights", path=name)
            caller.gather()
            caller.step()
        for name, untrained in (("step.1", True), ("step_1", False), ("ä" * 200, False)):
            assert "error" not in caller("load_weights", path=name)
            assert same(caller.weights(), before) == untrained


def test_a_state_of_adapters_of_another_kind_is_refused(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server, lora_config={"rank": 2, "alpha": 4})
        caller("save_weights", path="adapters")
        assert "error" not in caller("load_weights", path="adapters")
        other = Caller(server, lora_config={"rank": 2, "alpha": 8})
        assert "other LoRA adapters" in other("load_weights", path="adapters")["error"]


@pytest.mark.parametrize(
    "adam",
    [
        {"learning_rate": -0.01},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"grad_clip_norm": -1.0},
    ],
    ids=str,
)
def test_what_would_be_no_adamw_is_refused(adam: dict[str, float], tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        caller = Caller(server)
        caller.gather()
        answer = caller.step(**adam)
        assert next(iter(adam)) in answer["error"]
        assert answer["category"] == "user"
        caller.step()  # the gradient is still there
        assert same(caller.weights(), plain(server, DATA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_input": {"chunks": [{"tokens": [10**30, 5, 6]}]}}, "int"),
        ({"target_tokens": [4.5, 5, 6]}, "target_tokens[0] is 4.5, no int64"),
        ({"target_tokens": [1e300, 5, 6]}, "target_tokens[0] is 1e+300"),
        ({"weights": [1e300, 0, 0]}, "weights[0] is 1e+300, no float32"),
    ],
)
def test_a_number_out_of_range_is_the_clients_fault(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    datum = wire([4, 5, 6, 7], [1.0, 1.0, 1.0])
    for name, values in change.items():
        if name == "model_input":
            datum[name] = values
        else:
            datum["loss_fn_inputs"][name]["data"] = values
    with fireworks_service(tmp_path) as server:
        answer = Caller(server).gather([datum])
        assert answer["category"] == "user"
        assert message in answer["error"]
