"""New weights over HTTP, for real: the bundled model behind a server that takes them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eval_protocol_rft.cli import app as cli
from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.local.server._weights import ReloadingSampler
from eval_protocol_rft.sampling._endpoint import request_body
from eval_protocol_rft.sampling._exactness import decode_stream
from eval_protocol_rft.sampling._types import TokenIds
from tests.loop.policies import arithmetic_sampler
from tests.loop.test_live_weights import LONG, PARAMS, noisy, prompt
from tests.serving import running
from tests.waiting import PATIENCE, wait_until

Tensors = dict[str, torch.Tensor]
GATE = "model.layers.0.mlp.gate_proj.weight"
LAST_NORM = "model.norm.weight"


@dataclass
class Served:
    sampler: LocalSampler
    client: httpx.Client

    def reload(self, folder: object, **more: object) -> httpx.Response:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, **more}
        return self.client.post("/collective_rpc", json=call)

    def name(self, version: str) -> httpx.Response:
        return self.client.post("/update_weight_version", json={"new_version": version})

    def answer(self) -> dict[str, object]:
        """A greedy answer, with its raw logprobs."""
        body = {"model": "m", "prompt": prompt(self.sampler), "temperature": 0, "logprobs": True}
        choice = self.client.post("/v1/completions", json=body).json()["choices"][0]
        return choice["logprobs"]

    def version(self) -> str:
        """As each event of a stream says it."""
        body = {"model": "m", "prompt": prompt(self.sampler), "stream": True}
        text = self.client.post("/v1/completions", json=body).text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        [model] = {json.loads(line)["model"] for line in lines[:-1]}
        return model.partition("@")[2]


@contextmanager
def serving(sampler: LocalSampler, *, reloads: bool = True) -> Iterator[Served]:
    app = create_app(
        ReloadingSampler(sampler) if reloads else sampler,
        sampler.tokenizer,
        model_name="m",
        context_length=sampler.context_length,
    )
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield Served(sampler, client)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(arithmetic_sampler(policy_version="initial")) as server:
        yield server


def write(folder: Path, weights: Tensors, **metadata: str) -> Path:
    folder.mkdir()
    save_file(
        {name: value.clone() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt", **metadata},
    )
    return folder


def write_shards(folder: Path, weights: Tensors) -> Path:
    folder.mkdir()
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"part-{i}.safetensors"
        save_file({name: weights[name].clone() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def tied(weights: Tensors) -> Tensors:
    """As the bundled model has them: the output layer is the embeddings."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def without(weights: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in weights.items() if name not in names}


def assert_sampled_with(sampler: LocalSampler, weights: Tensors) -> None:
    for name, value in sampler.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("form", ["untied", "tied left out", "shards", "bfloat16"])
def test_a_folder_of_weights_is_what_is_sampled_from_then_on(served, form, tmp_path):
    new = tied(noisy(served.sampler))
    if form == "bfloat16":
        new = {name: value.bfloat16() for name, value in new.items()}
    before = served.answer()
    if form == "shards":
        folder = write_shards(tmp_path / "new", new)
    else:
        kept = without(new, "lm_head.weight") if form == "tied left out" else new
        folder = write(tmp_path / "new", kept)
    reply = served.reload(folder)
    assert (reply.status_code, reply.json()) == (200, {"results": [None]})
    assert served.client.post("/reset_prefix_cache").json() == {"success": True}
    assert_sampled_with(served.sampler, {k: v.float() for k, v in new.items()})
    assert served.answer() != before


def test_completions_say_which_weights_drew_them(served, tmp_path):
    new = tied(noisy(served.sampler))
    assert served.version() == "initial"
    served.reload(write(tmp_path / "a", new))
    of_content = served.version()
    assert of_content.startswith("weights-")
    served.reload(write_shards(tmp_path / "b", new))
    assert served.version() == of_content, "the same weights have the same name"
    reply = served.name("step-7")
    assert reply.json() == {"success": True, "new_version": "step-7"}
    assert served.version() == "step-7"
    served.reload(write(tmp_path / "c", tied(noisy(served.sampler, 0.01))))
    assert served.version().startswith("weights-")
    assert served.version() != of_content
    served.reload(write(tmp_path / "d", new, weight_version="step-8"))
    assert served.version() == "step-8", "named in the file: together with the weights"


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lose_a_shard(folder: Path) -> None:
    (folder / "part-1.safetensors").unlink()


def _lose_tensors_of_a_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "part-1.safetensors")


def _point_outside(folder: Path) -> None:
    index = {"weight_map": {GATE: "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda new: without(new, GATE), f"lack {GATE}"),
        (lambda new: {**new, "extra.weight": torch.zeros(1)}, "unknown extra.weight"),
        (lambda new: {**new, GATE: torch.zeros(2, 2)}, f"misshape {GATE}"),
        (lambda new: {**new, LAST_NORM: new[LAST_NORM] * torch.nan}, "not finite"),
        (lambda new: {**new, "lm_head.weight": new["lm_head.weight"] + 1}, "are tied"),
    ],
    ids=["missing", "unknown", "shape", "nan", "untied"],
)
def test_weights_of_another_model_are_refused_and_change_nothing(served, change, said, tmp_path):
    own = {name: value.clone() for name, value in served.sampler.model.state_dict().items()}
    before = served.answer()
    reply = served.reload(write(tmp_path / "new", change(tied(noisy(served.sampler)))))
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert_sampled_with(served.sampler, own)
    assert served.answer() == before
    assert served.version() == "initial"


@pytest.mark.parametrize(
    ("shards", "spoil", "said"),
    [
        (False, _cut, "cannot read"),
        (True, _lose_a_shard, "part-1.safetensors"),
        (True, _lose_tensors_of_a_shard, "written to its end"),
        (True, _point_outside, "must lie in the same folder"),
        (False, lambda folder: (folder / "model.safetensors").unlink(), "has neither"),
    ],
    ids=["cut off", "no shard", "another shard", "outside", "empty"],
)
def test_a_folder_that_is_not_whole_is_refused(served, shards, spoil, said, tmp_path):
    own = {name: value.clone() for name, value in served.sampler.model.state_dict().items()}
    new = tied(noisy(served.sampler))
    folder = (write_shards if shards else write)(tmp_path / "new", new)
    spoil(folder)
    reply = served.reload(folder)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert_sampled_with(served.sampler, own)
    assert served.version() == "initial"


def test_what_is_no_reload_is_refused_with_a_reason(served, tmp_path):
    def message(reply: httpx.Response, status: int) -> str:
        assert reply.status_code == status
        return reply.json()["error"]["message"]

    for nowhere in (tmp_path / "nowhere", "x" * 5000, "nul\0"):
        assert "no folder" in message(served.reload(nowhere), 400)
    assert "shutdown" in message(served.reload(tmp_path, method="shutdown"), 400)
    assert "kwargs" in message(
        served.client.post("/collective_rpc", json={"method": "reload_weights"}), 400
    )
    assert "new_version" in message(served.name(""), 400)
    assert "JSON" in message(served.client.post("/update_weight_version", content=b"{"), 415)
    for path in ("/collective_rpc", "/update_weight_version"):
        headers = {"content-type": "text/plain"}
        body = b'{"new_version": "x"}'
        assert "application/json" in message(
            served.client.post(path, content=body, headers=headers), 415
        )
    assert served.client.get("/collective_rpc").status_code == 405


def test_the_command_says_who_may_change_the_weights():
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "100"}).output
    words = " ".join(re.findall(r"[\w-]+", shown))
    assert "whoever reaches the port may change the weights" in words
    assert "--reloads" in words


@pytest.mark.parametrize("path", ["collective_rpc", "reset_prefix_cache", "update_weight_version"])
def test_a_server_that_was_not_started_for_it_says_how(path):
    with serving(arithmetic_sampler(), reloads=False) as server:
        reply = server.client.post(f"/{path}", json={"new_version": "x"})
        assert reply.status_code == 403
        assert "ep-rft serve --reloads" in reply.json()["error"]["message"]


def _until_one_runs(sampler: LocalSampler) -> None:
    """The thread exists from the first request on; a forward takes a millisecond."""
    wait_until(lambda: sampler._worker._thread is not None and not sampler.pending)
    time.sleep(0.02)


async def test_a_completion_under_way_goes_on_and_names_both(served, tmp_path):
    """The stream names the first token's weights and the last one's; in between none."""
    ids = TokenIds(prompt(served.sampler))
    body = json.loads(request_body(ids, LONG, 3, stream=True)) | {"model": "m", "temperature": 2.0}
    folder = write(tmp_path / "new", tied(noisy(served.sampler)), weight_version="step-1")
    replies: list[httpx.Response] = []
    url = str(served.client.base_url)

    def ask() -> None:
        replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE))

    asking = threading.Thread(target=ask)
    asking.start()
    await asyncio.to_thread(_until_one_runs, served.sampler)
    assert served.reload(folder).status_code == 200
    await asyncio.to_thread(asking.join)
    [completion] = decode_stream(replies[0].content, ids, LONG)
    assert len(completion.token_ids) == 200
    assert (completion.first_policy_version, completion.policy_version) == ("initial", "step-1")


async def test_another_name_for_the_same_weights_marks_nothing():
    sampler = ReloadingSampler(arithmetic_sampler(policy_version="initial"))
    ids = prompt(arithmetic_sampler())
    running_one = asyncio.create_task(sampler.sample(ids, LONG, seed=3))
    await asyncio.sleep(0.05)
    await sampler.rename("renamed")
    completion = await running_one
    assert (completion.policy_version, completion.first_policy_version) == ("renamed", None)
    await sampler.aclose()


async def test_other_weights_under_the_same_name_are_other_weights(tmp_path):
    inner = arithmetic_sampler(policy_version="initial")
    sampler = ReloadingSampler(inner)
    for scale in (0.01, 0.05):
        write(tmp_path / str(scale), tied(noisy(inner, scale)), weight_version="step-1")
    await sampler.reload(tmp_path / "0.01")
    running_one = asyncio.create_task(sampler.sample(prompt(inner), LONG, seed=3))
    await asyncio.sleep(0.05)
    assert not running_one.done()
    await sampler.reload(tmp_path / "0.05")
    completion = await running_one
    assert completion.policy_version == sampler.version == "step-1"
    assert completion.first_policy_version == "step-1-replaced"
    undisturbed = await sampler.sample(prompt(inner), PARAMS)
    assert undisturbed.first_policy_version is None
    await sampler.aclose()


def test_a_sampler_whose_weights_have_no_name_is_refused():
    with pytest.raises(ValueError, match="policy_version"):
        ReloadingSampler(arithmetic_sampler())


def test_the_bundled_models_own_file_is_accepted(served):
    """It leaves the tied output layer out."""
    from eval_protocol_rft.local.models import bundled_model_path

    folder = bundled_model_path("arithmetic")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    before = served.answer()
    assert served.reload(folder).status_code == 200
    assert served.answer() == before
