"""What the local service remembers, and the weights that it keeps."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._store import StateError, Store
from eval_protocol_rft.loop.service._weights import BaseModel, Weights


def test_resources_come_back_in_the_order_they_were_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("b", "a", "c"):
        store.put("models", f"accounts/acc/models/{key}", {"name": key})
    store.put("models", "accounts/acc/models/b", {"name": "b", "state": "READY"})
    assert store.delete("models", "accounts/acc/models/c")
    assert not store.delete("models", "accounts/acc/models/c")
    assert [r["name"] for r in store.list("models", "accounts/acc/")] == ["b", "a"]
    assert store.list("datasets") == []
    assert store.get("models", "accounts/acc/models/b") == {"name": "b", "state": "READY"}
    assert store.get("models", "accounts/acc/models/c") is None


def test_a_change_is_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("jobs", "one", {"state": "old"})

    def fail() -> None:
        with store.change():
            store.put("jobs", "one", {"state": "new"})
            store.put("jobs", "two", {})
            raise KeyError("job")

    with pytest.raises(KeyError):
        fail()
    assert store.get("jobs", "one") == {"state": "old"}
    assert store.get("jobs", "two") is None


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StateError, match="in use by another server"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StateError, match=r"file cannot be a folder.*another --state folder"):
        Store(tmp_path / "file")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"not a database at all" * 100)
    for _ in range(2):  # and the claim on it is given back
        with pytest.raises(StateError, match="cannot be read"):
            Store(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from eval_protocol_rft.loop.service._store import Store
store = Store(Path(sys.argv[1]))
for i in range(20):
    store.put("jobs", str(i), {"i": i})
with store.change():
    store.put("jobs", "unfinished", {})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_put_is_there_after_a_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [job["i"] for job in Store(tmp_path).list("jobs")] == list(range(20))


@pytest.fixture(scope="module")
def arithmetic() -> BaseModel:
    folder = bundled_model_path("arithmetic")
    assert folder is not None
    return BaseModel("arithmetic", folder)


def test_weights_hold_what_differs_from_the_base(arithmetic: BaseModel, tmp_path: Path) -> None:
    weights = Weights(tmp_path, [arithmetic])
    module = weights.module(arithmetic.weights_id)
    changed = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        module.get_parameter(changed).add_(1.0)
    key = weights.save(module.state_dict(), base=arithmetic.name)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < arithmetic.module.get_parameter(changed).nbytes * 1.2
    for again in (weights.module(key).state_dict(), weights.state_dict(key)):
        assert again.keys() == module.state_dict().keys()
        assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())
    assert weights.base_of(key) is arithmetic
    assert not torch.equal(arithmetic.module.get_parameter(changed), module.get_parameter(changed))


def test_tied_weights_change_together(arithmetic: BaseModel, tmp_path: Path) -> None:
    weights = Weights(tmp_path, [arithmetic])
    module = weights.module(arithmetic.weights_id)
    tensors = module.state_dict()
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.data_ptr() == tensors["lm_head.weight"].data_ptr()
    with torch.no_grad():
        embedding.mul_(2.0)
    again = weights.state_dict(weights.save(module.state_dict(), base=arithmetic.name))
    assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())


def test_unused_weights_go_and_others_stay(arithmetic: BaseModel, tmp_path: Path) -> None:
    weights = Weights(tmp_path, [arithmetic])
    state = {k: v + 1 for k, v in arithmetic.module.state_dict().items()}
    kept, gone = (weights.save(state, base=arithmetic.name) for _ in range(2))
    (tmp_path / "cut-off.part").write_bytes(b"")
    weights = Weights(tmp_path, [arithmetic])
    weights.delete_all_but({kept})
    assert [path.stem for path in tmp_path.iterdir()] == [kept]
    with pytest.raises(ServiceError, match="not found"):
        weights.base_of(gone)
    assert weights.base_of(arithmetic.weights_id) is arithmetic


def test_an_unknown_base_model_names_those_there_are(arithmetic: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="accounts/fireworks/models/arithmetic") as caught:
        Weights(tmp_path, [arithmetic]).base("accounts/fireworks/models/qwen3-8b")
    assert caught.value.status == 404
