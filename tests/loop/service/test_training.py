"""The training wire, through the service's own client library and by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fireworks.training import sdk
from torch import Tensor

from tests.service import BASE, KEY, RunningService, arithmetic_base, fireworks_service

IDS = [[4, 5, 6, 7, 8, 9], [9, 8, 7], [3, 4, 3, 4, 3]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with fireworks_service(tmp_path_factory.mktemp("service")) as running:
        yield running


class Clients:
    """Training clients, each of a service client of its own, as the library wants it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._services: list[Any] = []

    def __call__(self, lora_rank: int = 0) -> Any:
        return self._service().create_training_client(base_model=BASE, lora_rank=lora_rank)

    def reference(self) -> Any:
        return self._service().create_reference_client(base_model=BASE)

    def _service(self) -> Any:
        self._services.append(sdk.FiretitanServiceClient(api_key=KEY, base_url=self._url))
        return self._services[-1]

    def close(self) -> None:
        for service in self._services:
            service.close()


@pytest.fixture
def clients(server: RunningService) -> Iterator[Clients]:
    made = Clients(server.url)
    yield made
    made.close()


def tensor(values: Any, dtype: str = "float32") -> sdk.types.TensorData:
    return sdk.types.TensorData(data=list(values), dtype=dtype, shape=[len(values)])


def datum(ids: list[int], **inputs: Any) -> sdk.types.Datum:
    return sdk.types.Datum(
        model_input=sdk.types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": tensor(ids[1:], "int64"),
            **{name: tensor(values) for name, values in inputs.items()},
        },
    )


def base_logprobs(ids: list[int], module: Any = None) -> Tensor:
    """[T] by plain transformers and torch."""
    module = module or arithmetic_base().module
    logits = module(input_ids=torch.tensor([ids[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_forward_gives_the_logprobs_of_every_target(clients: Clients) -> None:
    client = clients()
    answer = client.forward(
        [datum(ids, weights=[0.0] * (len(ids) - 1)) for ids in IDS], "cross_entropy"
    ).result()
    for ids, output in zip(IDS, answer.loss_fn_outputs, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(
                output["logprobs"].to_numpy(), base_logprobs(ids).numpy(), atol=1e-5
            )


FORMULAS: dict[str, tuple[dict[str, float], Callable[..., Tensor]]] = {
    "importance_sampling": ({}, lambda r, lp, q, a: -(r * a)),
    "ppo": (
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        lambda r, lp, q, a: -torch.minimum(r * a, r.clamp(0.9, 1.1) * a),
    ),
    "cispo": (
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        lambda r, lp, q, a: -(r.clamp(0.9, 1.1).detach() * lp * a),
    ),
    "dro": ({"beta": 0.3}, lambda r, lp, q, a: -(lp * a - 0.15 * (lp - q) ** 2)),
    "dapo": (
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1, "eps_clip_c": 1.2},
        lambda r, lp, q, a: torch.where(
            a < 0,
            torch.minimum(-torch.minimum(r * a, r.clamp(0.9, 1.1) * a), -1.2 * a),
            -torch.minimum(r * a, r.clamp(0.9, 1.1) * a),
        ),
    ),
    "gspo": (
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        lambda r, lp, q, a: gspo(lp, q, a),
    ),
    "reinforce": ({}, lambda r, lp, q, a: -(r * a)),
}


def gspo(lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
    s = (lp - q)[a != 0].mean().exp().detach() * (lp - lp.detach()).exp()
    return -torch.minimum(s * a, s.clamp(0.9, 1.1) * a)


@pytest.mark.parametrize("loss_fn", FORMULAS)
def test_a_step_on_a_loss_is_the_step_of_autograd(
    loss_fn: str, server: RunningService, clients: Clients
) -> None:
    """The very weights after two steps of SGD-like Adam are those of torch's own optimizer on the
    formula, differentiated in one piece."""
    config, formula = FORMULAS[loss_fn]
    rng = np.random.default_rng(3)
    data, module = [], copy.deepcopy(arithmetic_base().module)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.01
    )
    terms = []
    for ids in IDS:
        with torch.no_grad():
            lp = base_logprobs(ids).numpy()
        advantages = rng.normal(size=len(lp)).astype(np.float32)
        advantages[0] = 0.0
        q = (lp + rng.normal(scale=0.2, size=len(lp))).astype(np.float32)
        data.append(datum(ids, logprobs=q.tolist(), advantages=advantages.tolist()))
        terms.append((ids, torch.from_numpy(q), torch.from_numpy(advantages)))
    client = clients()
    adam = sdk.types.AdamParams(
        learning_rate=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.01, grad_clip_norm=1.0
    )
    for _ in range(2):
        answer = client.forward_backward(data, loss_fn, loss_fn_config=config)
        client.optim_step(adam).result()
        loss = torch.stack(
            [
                formula((lp - q).exp(), lp, q, a).sum()
                for ids, q, a in terms
                for lp in [base_logprobs(ids, module)]
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        assert answer.result().metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    name = client.save_weights_for_sampler_ext(f"after-{loss_fn.replace('_', '-')}").snapshot_name
    rows = server.service.store.list("snapshots")
    (row,) = [row for row in rows if row["identity"] == name]
    trained = server.service.weights.state_dict(row["weights"])
    for key, value in module.state_dict().items():
        np.testing.assert_allclose(trained[key].numpy(), value.detach().numpy(), atol=2e-5)


def step(client: Any, seed: int, **adam: Any) -> None:
    rng = random.Random(seed)
    data = [datum(ids, weights=[rng.uniform(-1, 1) for _ in ids[1:]]) for ids in IDS]
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(sdk.types.AdamParams(learning_rate=1e-3, **adam)).result()


def weights_of(server: RunningService, client: Any, name: str) -> dict[str, Tensor]:
    saved = client.save_weights_for_sampler_ext(name).snapshot_name
    rows = server.service.store.list("snapshots")
    (row,) = [row for row in rows if row["identity"] == saved]
    return server.service.weights.state_dict(row["weights"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("divisor", ["num_loss_tokens", "num_sequences"])
def test_a_normalised_gradient_is_divided_once(
    divisor: str, server: RunningService, clients: Clients
) -> None:
    """Over two calls, by hand divided and by the server divided: the same weights."""
    weights = [[0.0, 0.5, -1.0, 0.0, 2.0], [1.0, 0.0], [0.25, 0.5, 0.0, 1.0]]
    count = {"num_loss_tokens": 7, "num_sequences": 3}[divisor]
    trained = []
    for scale, asked in ((1.0, divisor), (1.0 / count, None)):
        client = clients()
        for ids, values in zip(IDS, weights, strict=True):
            scaled = [value * scale for value in values]
            client.forward_backward([datum(ids, weights=scaled)], "cross_entropy").result()
        client.optim_step(
            sdk.types.AdamParams(learning_rate=1e-3, eps=1e-4),
            grad_accumulation_normalization=asked,
        ).result()
        trained.append(
            weights_of(server, client, "divided-by-hand" if asked is None else "divided")
        )
    for name, value in trained[0].items():
        np.testing.assert_allclose(value.numpy(), trained[1][name].numpy(), atol=1e-6)


def test_the_same_datum_has_the_same_logprobs_whatever_it_is_sent_with(clients: Clients) -> None:
    """To the last bit: so ratios are exactly 1 on policy, in calls of any size."""
    client = clients()
    data = [datum(ids, weights=[1.0] * (len(ids) - 1)) for ids in IDS]
    alone = [client.forward([one], "cross_entropy").result().loss_fn_outputs[0] for one in data]
    together = client.forward(data, "cross_entropy").result().loss_fn_outputs
    training = client.forward_backward(data[::-1], "cross_entropy").result().loss_fn_outputs[::-1]
    for outputs in zip(alone, together, training, strict=True):
        first, *others = (output["logprobs"].to_numpy() for output in outputs)
        assert all((first == other).all() for other in others)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_saved_state_goes_on_as_if_nothing_had_been(
    rank: int, server: RunningService, clients: Clients
) -> None:
    client = clients(rank)
    step(client, 1)
    path = client.save_state(f"half-way-{rank}").result().path
    step(client, 2)
    straight = weights_of(server, client, "straight")
    other = clients(rank)
    other.load_state_with_optimizer(path).result()
    step(other, 2)
    assert same(straight, weights_of(server, other, "resumed"))
    fresh = clients(rank)
    fresh.load_state(path).result()
    step(fresh, 2)
    assert not same(straight, weights_of(server, fresh, "fresh-moments"))
    assert f"half-way-{rank}" in client.list_checkpoints()


def test_adapters_change_what_is_sampled_and_nothing_else(
    server: RunningService, clients: Clients
) -> None:
    client = clients(4)
    before = weights_of(server, client, "untrained")
    assert same(before, arithmetic_base().module.state_dict())
    step(client, 1)
    after = weights_of(server, client, "trained")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all("proj" in name for name in changed)
    reference = clients.reference()
    answer = reference.forward([datum(IDS[0], weights=[0.0] * 5)], "cross_entropy").result()
    with torch.no_grad():
        expected = base_logprobs(IDS[0]).numpy()
    np.testing.assert_allclose(
        answer.loss_fn_outputs[0]["logprobs"].to_numpy(), expected, atol=1e-5
    )


def call(server: RunningService, path: str, body: Any, status: int = 200) -> Any:
    answer = httpx.post(f"{server.url}/api/v1/{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def new_model(server: RunningService, **more: Any) -> str:
    session = call(server, "create_session", {"type": "create_session"})["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE, **more}
    future = call(server, "create_model", body)["request_id"]
    assert call(server, "create_model", body)["request_id"] == future
    return str(call(server, "retrieve_future", {"request_id": future})["model_id"])


def wire(ids: list[int], weights: list[float], **changes: Any) -> dict[str, Any]:
    length = len(ids) - 1
    inputs = {
        "target_tokens": {"data": ids[1:], "dtype": "int64", "shape": [length]},
        "weights": {"data": weights, "dtype": "float32", "shape": [length]},
    }
    chunk = {"tokens": ids[:-1], "type": "encoded_text"}
    return {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {**inputs, **changes}}


def backward(model: str, seq: int, data: Any, loss_fn: str = "cross_entropy", **more: Any) -> Any:
    given = {"data": data, "loss_fn": loss_fn, **more}
    return {"forward_backward_input": given, "model_id": model, "seq_id": seq}


def test_calls_are_carried_out_in_their_order_and_once(server: RunningService) -> None:
    model = new_model(server)
    first = backward(model, 1, [wire([4, 5, 6], [1.0, 1.0])])
    second = {"adam_params": {"learning_rate": 0.01}, "model_id": model, "seq_id": 2}
    third = {"path": "in-order", "model_id": model, "seq_id": 3}
    futures = [
        call(server, name, body)["request_id"]
        for name, body in (
            ("save_weights_for_sampler", third),
            ("optim_step", second),
            ("forward_backward", first),
            ("forward_backward", first),
            ("optim_step", second),
        )
    ]
    assert futures[0] != futures[1] != futures[2] == futures[3]
    for future in futures:
        answer = call(server, "retrieve_future", {"request_id": future})
        assert "error" not in answer
        assert call(server, "retrieve_future", {"request_id": future}) == answer
    (row,) = [r for r in server.service.store.list("snapshots") if r["identity"] == "in-order"]
    stepped = copy.deepcopy(arithmetic_base().module)
    optimizer = torch.optim.AdamW(
        stepped.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
    )
    (-base_logprobs([4, 5, 6], stepped).sum()).backward()
    optimizer.step()
    for name, value in server.service.weights.state_dict(row["weights"]).items():
        np.testing.assert_allclose(value.numpy(), stepped.state_dict()[name].numpy(), atol=1e-4)
    other = backward(model, 1, [wire([4, 5], [1.0])])
    assert "another call" in call(server, "forward_backward", other, 409)["message"]


WRONG: dict[str, tuple[Any, str]] = {
    "loss": (("nll", [wire([4, 5], [1.0])]), "loss_fn 'nll' is not one of"),
    "unpublished": (("dppo", [wire([4, 5], [1.0])]), "formula is not published"),
    "missing": (("ppo", [wire([4, 5], [1.0])]), "datum 0: loss_fn_inputs lacks advantages"),
    "length": (
        ("cross_entropy", [wire([4, 5], [1.0]), wire([4, 5, 6], [1.0])]),
        "datum 1: weights has shape [2] and 1 values",
    ),
    "type": (
        (
            "cross_entropy",
            [wire([4, 5], [1.0], target_tokens={"data": [5], "dtype": "float32", "shape": [1]})],
        ),
        "datum 0: target_tokens has dtype float32",
    ),
    "vocabulary": (("cross_entropy", [wire([4, 99999], [1.0])]), "target_tokens[0] is 99999"),
    "input": (("cross_entropy", [wire([-1, 4], [1.0])]), "model_input[0] is -1"),
    "empty": (("cross_entropy", [wire([4], [])]), "model_input has 0 tokens"),
    "context": (
        ("cross_entropy", [wire([4] * 9000, [0.0] * 8999)]),
        "model_input has 8999 tokens",
    ),
    "config": (
        ("cross_entropy", [wire([4, 5], [1.0])], {"clip_low_threshold": 0.8}),
        "loss_fn_config of cross_entropy takes nothing",
    ),
    "datums": (("cross_entropy", [{"model_input": 3}]), "the request cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_datum_is_an_error_of_its_call_alone(kind: str, server: RunningService) -> None:
    """The gradient of the calls before it stays, and the call after it is carried out."""
    (loss_fn, data, *config), message = WRONG[kind]
    model = new_model(server)
    good = [wire([4, 5, 6], [1.0, -1.0])]
    calls = [
        ("forward_backward", backward(model, 1, good)),
        (
            "forward_backward",
            backward(model, 2, data, loss_fn, loss_fn_config=config[0] if config else None),
        ),
        ("optim_step", {"adam_params": {}, "model_id": model, "seq_id": 3}),
    ]
    futures = [call(server, name, body)["request_id"] for name, body in calls]
    answers = [call(server, "retrieve_future", {"request_id": future}) for future in futures]
    assert message in answers[1]["error"]
    assert answers[1]["category"] == "user"
    assert answers[2]["metrics"]["grad_norm"] > 0


def test_a_step_that_is_not_finite_changes_nothing(server: RunningService) -> None:
    model = new_model(server)
    huge = backward(model, 1, [wire([4, 5], [3e38]), wire([4, 5], [3e38])])
    step = {"adam_params": {}, "model_id": model, "seq_id": 2}
    save = {"path": "unharmed", "model_id": model, "seq_id": 3}
    futures = [
        call(server, name, body)["request_id"]
        for name, body in (
            ("forward_backward", huge),
            ("optim_step", step),
            ("save_weights_for_sampler", save),
        )
    ]
    answers = [call(server, "retrieve_future", {"request_id": future}) for future in futures]
    assert any("not finite" in a.get("error", "") or "norm" in a.get("error", "") for a in answers)
    (row,) = [r for r in server.service.store.list("snapshots") if r["identity"] == "unharmed"]
    assert same(
        server.service.weights.state_dict(row["weights"]), arithmetic_base().module.state_dict()
    )


def test_what_is_not_there_is_said(server: RunningService) -> None:
    model = new_model(server, base_only=True)
    assert "not found" in call(server, "retrieve_future", {"request_id": "x:1"}, 404)["message"]
    assert call(server, "retrieve_future", {"request_id": f"{model}:7"}, 404)
    unknown = {"session_id": "session-x", "model_seq_id": 0, "base_model": BASE}
    assert "session-x" in call(server, "create_model", unknown, 404)["detail"]
    assert (
        "not found" in call(server, "optim_step", {"model_id": "x:0", "seq_id": 1}, 404)["detail"]
    )
    future = call(server, "optim_step", {"model_id": model, "seq_id": 1, "adam_params": {}})
    assert "frozen" in call(server, "retrieve_future", future)["error"]
    load = {"path": "nowhere", "optimizer": True, "model_id": new_model(server), "seq_id": 1}
    future = call(server, "load_weights", load)
    assert "'nowhere' not found" in call(server, "retrieve_future", future)["error"]
    assert httpx.post(f"{server.url}/api/v1/optim_step", content=b"{").status_code == 400
    job = f"{server.url}/training/v1/rlorTrainerJobs/acc/none/api/v1/healthz"
    assert "rlorTrainerJobs/none not found" in httpx.get(job).json()["message"]


def test_old_answers_expire(server: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_protocol_rft.loop.service.training._operations.KEPT", 2)
    monkeypatch.setattr("eval_protocol_rft.loop.service.training._training._REPLAY_SHARE", 0.0)
    model = new_model(server)
    futures = []
    for seq in range(1, 12, 2):
        call(server, "forward_backward", backward(model, seq, [wire([4, 5], [1.0])]))
        step = {"adam_params": {}, "model_id": model, "seq_id": seq + 1}
        futures.append(call(server, "optim_step", step))
        call(server, "retrieve_future", futures[-1])
    assert "expired" in call(server, "retrieve_future", futures[0], 410)["message"]


def test_deltas_that_nothing_serves_are_deleted(server: RunningService) -> None:
    model = new_model(server)
    for seq in range(1, 13):
        kind = "base" if seq == 1 else "delta"
        save = {"path": f"tidy-{seq}", "checkpoint_type": kind, "model_id": model, "seq_id": seq}
        call(server, "retrieve_future", call(server, "save_weights_for_sampler", save))
    kept = [
        r["identity"] for r in server.service.store.list("snapshots") if "tidy" in r["identity"]
    ]
    assert kept[0] == "tidy-1"
    assert kept[1:] == ["tidy-10", "tidy-11", "tidy-12"]


def test_a_state_and_a_snapshot_of_one_name_are_both_listed(server: RunningService) -> None:
    model = new_model(server)
    for seq, name in enumerate(("save_weights_for_sampler", "save_weights"), start=1):
        save = {"path": "namesake", "model_id": model, "seq_id": seq}
        assert call(server, "retrieve_future", call(server, name, save))["path"] == "namesake"
    rows = server.service.store.list("checkpoints", "accounts/acc/")
    kinds = [row["checkpointType"] for row in rows if row["name"].endswith("/namesake")]
    assert sorted(kinds) == ["CHECKPOINT_TYPE_INFERENCE_BASE", "CHECKPOINT_TYPE_TRAINING"]
    info = call(server, "weights_info", {"tinker_path": "namesake"})
    assert info == {"base_model": BASE, "is_lora": False, "lora_rank": None}
