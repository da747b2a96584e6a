"""Shared fixtures. The environment is set before anything imports Eval Protocol."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from tests.programs import Zygote
    from tests.stub_server import StubServer

# No network, no uploads, no database of runs in the home folder.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["EP_NO_UPLOAD"] = "1"
os.environ["DISABLE_EP_SQLITE_LOG"] = "1"
os.environ["EP_DISABLE_AUTO_BROWSER"] = "1"
for _name in ("EP_LLM_API_BASE", "EP_LLM_BASE_URL", "FIREWORKS_BASE_URL", "FIREWORKS_API_KEY"):
    os.environ.pop(_name, None)

# Processes under test hear Ctrl-C however the tests were started: a shell's background jobs do not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does. `long` looks further.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# What the tests import lives until they end: none of it is looked at for garbage again and again.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """What tests expect of models in this process is of the CPU, unless a GPU is what they test."""
    if "gpu" not in config.getoption("-m").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# What follows imports where it is used: not every test pays for Eval Protocol and transformers.


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_checkout() -> Iterator[None]:
    """What a test writes beside the sources would be committed with the next `git add`."""
    root = Path(__file__).parent.parent
    before = set(os.listdir(root))
    yield
    left = {name for name in set(os.listdir(root)) - before if not name.startswith(".")}
    assert not left, f"tests left {sorted(left)} in {root}"


@pytest.fixture
def server() -> Iterator[StubServer]:
    """A server in Fireworks' shape on loopback, with no script: it answers well."""
    from tests.stub_server import StubServer

    with StubServer() as running:
        yield running


@pytest.fixture
def processor() -> FireworksTrainingRolloutProcessor:
    """A processor as users make it, with a tokenizer of one token per byte."""
    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from tests.rollouts import chat_tokenizer

    return FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as files."""
    from tests.rollouts import chat_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts `ep-rft` and `pytest` in processes of their own, at once."""
    from tests.programs import Zygote

    running = Zygote(tmp_path_factory.mktemp("programs"))
    yield running
    running.close()
