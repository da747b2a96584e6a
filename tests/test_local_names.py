"""What begins with `local/` is looked for on this machine alone, and found or refused at once."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local._tokenizer import TokenizerError, load_tokenizer
from eval_protocol_rft.local.models import NoSuchModelError, bundled_model_path, local_model_folder
from eval_protocol_rft.rollout._params import ParamsError, parse_completion_params
from tests.rollouts import record_of_row, roll_out, row_of

ARITHMETIC = bundled_model_path("arithmetic")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Names that were looked up or connected to; whoever does gets an error that is retried."""
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.mark.parametrize("name", ["arithmetics", "nobody/nothing", "/no/such/folder", "", "a b//c"])
def test_a_name_that_is_nowhere_is_refused_and_told_what_there_is(
    name: str, no_network: list[Any]
) -> None:
    with pytest.raises(NoSuchModelError, match="local/arithmetic, which comes with the package"):
        local_model_folder(f"local/{name}")
    with pytest.raises(TokenizerError, match="no such model on this machine"):
        load_tokenizer(f"local/{name}")
    with pytest.raises(Exception, match="no such model on this machine") as error:
        asyncio.run(
            roll_out(FireworksTrainingRolloutProcessor(), row_of(), {"model": f"local/{name}"})
        )
    assert ("did you mean local/arithmetic?" in str(error.value)) == (name == "arithmetics")
    assert not no_network


def test_the_tokenizer_that_the_record_names_can_be_asked_for(no_network: list[Any]) -> None:
    params = {"model": "local/arithmetic", "max_tokens": 4, "seed": 1}
    processor = FireworksTrainingRolloutProcessor()
    (first,) = asyncio.run(roll_out(processor, row_of("1+1="), params))
    record = record_of_row(first)
    again = {**params, "tokenizer": record.sampling.tokenizer}
    assert again["tokenizer"] == "local/arithmetic"
    (second,) = asyncio.run(roll_out(processor, row_of("1+1="), again))
    assert record_of_row(second).prompt_ids == record.prompt_ids
    assert record_of_row(second).sampling.tokenizer == "local/arithmetic"
    assert not no_network


def test_a_folder_and_what_was_downloaded_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any]
) -> None:
    assert local_model_folder("local/arithmetic") == ARITHMETIC
    assert local_model_folder(f"local/{tmp_path}") == tmp_path
    snapshot = tmp_path / "models--me--sums" / "snapshots" / "abc"
    (tmp_path / "models--me--sums" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--sums" / "refs" / "main").write_text("abc")
    assert ARITHMETIC is not None
    shutil.copytree(ARITHMETIC, snapshot)
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    assert local_model_folder("local/me/sums") == snapshot
    assert load_tokenizer("local/me/sums").name == "local/me/sums"
    assert not no_network


@pytest.mark.parametrize(
    "given",
    [
        {"api_base": "http://127.0.0.1:9"},
        {"base_url": "http://127.0.0.1:9"},
        {"api_key": "key-of-mine"},
        {"extra_headers": {"x-team": "a"}},
        {"extra_body": {"api_base": "http://127.0.0.1:9"}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_local_model_asks_no_server_so_an_address_for_it_is_a_contradiction(
    given: dict[str, Any],
) -> None:
    with pytest.raises(ParamsError, match=r"'local/arithmetic', which is sampled in this") as error:
        parse_completion_params({"model": "local/arithmetic", **given}, env={})
    assert "key-of-mine" not in str(error.value)
    env = {"FIREWORKS_API_KEY": "key-of-mine", "EP_LLM_API_BASE": "http://127.0.0.1:9"}
    assert parse_completion_params({"model": "local/arithmetic"}, env=env).endpoint is None
