"""What does not need Eval Protocol, torch or matplotlib does not pay for importing them."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = [
    "import eval_protocol_rft",
    "import eval_protocol_rft.pytest_plugin",
    "import eval_protocol_rft.record",
    "import eval_protocol_rft.sampling._http",
    "import eval_protocol_rft.sampling._fanout",
    "import eval_protocol_rft.report._terminal",
    "from eval_protocol_rft.report import write_report, write_training_report",
    "import eval_protocol_rft.cli",
    "import eval_protocol_rft.training",
    "import eval_protocol_rft.data._generate",
    "import eval_protocol_rft.scoring.executors._pool",
    "import eval_protocol_rft.data._dataset",
    "import eval_protocol_rft.loop.fireworks",
    "import eval_protocol_rft.loop._scheduler",
    "from eval_protocol_rft.loop import LoopOptions, LoraSettings, NothingToTrainOnError, train",
    "from eval_protocol_rft import SamplingParams, RetryPolicy, RolloutRecord",
]
HEAVY = ("eval_protocol", "litellm", "torch", "transformers", "matplotlib")


def test_light_modules_stay_light() -> None:
    """One after the other in one interpreter: the first that is not light is named."""
    code = f"""
import sys
for statement in {LIGHT!r}:
    exec(statement)
    print(statement, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{statement} []" for statement in LIGHT]


def test_every_public_name_is_there() -> None:
    import eval_protocol_rft

    for name in eval_protocol_rft.__all__:
        assert getattr(eval_protocol_rft, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eval_protocol_rft.no_such_name
