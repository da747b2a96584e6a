"""What `ep-rft serve --fireworks` makes of its options before anything listens."""

from __future__ import annotations

import pytest

from eval_protocol_rft.local.server import ServeError
from eval_protocol_rft.loop.service._command import base_models


def test_a_model_that_is_not_here_is_refused_with_how_another_takes_its_name() -> None:
    with pytest.raises(ServeError, match=r"--model qwen3-8b=local/arithmetic$"):
        list(base_models(["Qwen/Qwen3-8B"]))
    (model,) = base_models(["qwen3-8b=local/arithmetic"])
    assert model.name == "accounts/fireworks/models/qwen3-8b"


def test_a_place_that_is_not_there_is_named_as_it_was_written(tmp_path) -> None:
    place = f"mine={tmp_path / 'nothing'}"
    with pytest.raises(ServeError, match="nothing: there is no such model") as refused:
        list(base_models([place]))
    assert str(refused.value).startswith(f"--model {place}: ")
    assert "to serve a model that is there" not in str(refused.value)
