"""Agents of public packages against the gateway over HTTP, each in a process of its own, as its
documentation would write it: base URL and key are all that it knows of us.

What is asked of each: its answer is right, and the segments hold exactly the ids that went over the
seam to the sampler and came back. `EP_RFT_CLIENTS` names a folder with other packages than those of
the tests (`scripts/clients.sh` makes it): `frameworks/` and `verifiers/`, environments of Python,
and `node/`, which has `node_modules`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from eval_protocol_rft._segments import Segment
from eval_protocol_rft.episodes.gateway import Gateway
from tests.episodes.gateway.scripted_policy import Script, ScriptedPolicy, hermes
from tests.episodes.templates import APPENDS, merging_tokenizer
from tests.programs import Zygote
from tests.waiting import PATIENCE

AGENTS = Path(__file__).parent / "programs"
FOLDER = os.environ.get("EP_RFT_CLIENTS")
TASK = "What is 2+40, what is 1+1, and what is the sum of both?"

BOTH = (
    " I will add.\n"
    + hermes("add", '{"a":2,  "b": 40}')
    + "\n"
    + hermes("add", '{"b": 1, "a":1.0}')
)
"""Blanks around the text, odd spacing, keys in another order, a float: what clients write anew."""
SUM = hermes("add", '{"a": 42, "b": 2}')
CALCULATOR = {"calculator": [BOTH, SUM, "The sum is {last}."]}
THINKING = {
    "calculator": [f"<think>\nLet me see.\n</think>\n\n{text}" for text in CALCULATOR["calculator"]]
}
TYPED = {"calculator": [BOTH, SUM, '{"total": {last}}']}
TYPED_BY_TOOL = {"calculator": [BOTH, SUM, hermes("final_result", '{"total": {last}}')]}
AS_TOOL = {
    "clerk": ["Let me ask." + hermes("calculate", '{"input": "2+40+2"}'), "It is {last}."],
    **CALCULATOR,
}
AS_TWO_TOOLS = {
    "clerk": [
        hermes("calculate", '{"input": "2+40+2"}') + hermes("calculate", '{"input": "40+2+2"}'),
        "They are {last}.",
    ],
    **CALCULATOR,
}
"""Two conversations of a sub-agent at once, in the midst of a turn."""
HANDED_OFF = {
    "clerk": [hermes("transfer_to_calculator", "{}")],
    "calculator": ["", *CALCULATOR["calculator"]],
}
SMOL = {
    "": [
        "Adding." + hermes("add", '{"a":42,  "b": 2}'),
        hermes("final_answer", '{"answer": "{last}"}'),
    ]
}
SMOL_CODE = {
    "": ["I add.\n<code>\nx = add(42, 2)\nprint(x)\n</code>", "<code>\nfinal_answer(x)\n</code>"]
}

CODEX = {"": [hermes("exec_command", '{"cmd": "expr 42 + 2"}'), "The sum is {last}."]}
MINI = {
    "": [
        "I add." + hermes("bash", '{"command": "expr 42 + 2"}'),
        hermes("bash", '{"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo {last}"}'),
    ]
}


@dataclass(frozen=True)
class Client:
    """One row of the table in docs/gateway.md."""

    program: str
    script: Script
    answer: str = "The sum is 44."
    segments: int = 1
    """How many there are if the gateway continues whatever it can."""
    edits: int = 0
    """Calls whose client changed what it was answered, or what stands before that."""


def clients() -> dict[str, Client]:
    rows: dict[str, Client] = {}
    for stream in ("", " --stream"):

        def add(name: str, program: str, *rest, stream: str = stream, **fields) -> None:
            rows[name + stream.replace(" --", "-")] = Client(program + stream, *rest, **fields)

        add("openai-chat", "openai_chat.py", CALCULATOR)
        add("openai-responses", "openai_responses.py", CALCULATOR)
        for history in ("previous", "named"):
            program = f"openai_responses.py --history {history}"
            add(f"openai-responses-{history}", program, CALCULATOR)
        add("anthropic", "anthropic_messages.py", CALCULATOR)
        add("litellm-chat", "litellm_agent.py", CALCULATOR)
        # What streams in litellm 1.105, which Eval Protocol pins, gets a text where it had none.
        splits = FOLDER is None and bool(stream)
        program = "litellm_agent.py --model anthropic/policy"
        add("litellm-anthropic", program, CALCULATOR, segments=1 + splits, edits=int(splits))
        for api in ("chat", "responses"):
            program = f"openai_agents.py --api {api}"
            add(f"agents-{api}", program, CALCULATOR)
            add(f"agents-{api}-typed", f"{program} --team typed", TYPED, "total=44")
            add(f"agents-{api}-tool", f"{program} --team tool", AS_TOOL, "It is 44.", 2)
            add(f"agents-{api}-tools", f"{program} --team tool", AS_TWO_TOOLS, "They are 44.", 3)
            add(
                f"agents-{api}-handoff",
                f"{program} --team handoff",
                HANDED_OFF,
                segments=2,
                edits=1,
            )
        for api in ("chat", "responses", "anthropic"):
            add(f"langchain-{api}", f"langchain_agent.py --api {api}", CALCULATOR)
        for api, model in (
            ("chat", "openai-chat"),
            ("responses", "openai"),
            ("anthropic", "anthropic"),
        ):
            program = f"pydantic_ai_agent.py --model {model}:policy"
            add(f"pydantic-ai-{api}", program, CALCULATOR)
            add(f"pydantic-ai-{api}-typed", f"{program} --output tool", TYPED_BY_TOOL, "44")
        add("pydantic-ai-native", "pydantic_ai_agent.py --output native", TYPED, "44")
        add("smolagents", "smolagents_agent.py", SMOL, "44", 2, 1)
        add("smolagents-code", "smolagents_agent.py --code", SMOL_CODE, "44", 2, 1)
        add("node-openai-chat", "agent.mjs", CALCULATOR)
        add("node-openai-responses", "agent.mjs --responses", CALCULATOR)
        add("node-agents-chat", "openai_agents.mjs --chat", CALCULATOR)
        add("node-agents-responses", "openai_agents.mjs", CALCULATOR)
        add("ai-sdk-chat", "ai_sdk.mjs", CALCULATOR)
        add("ai-sdk-responses", "ai_sdk.mjs --responses", CALCULATOR)
        add("ai-sdk-anthropic", "ai_sdk.mjs --anthropic", CALCULATOR)
    for name, client in list(rows.items()):
        if client.script is CALCULATOR and name.count("-stream") + name.count("-named") == 0:
            rows[f"{name}-thinking"] = replace(client, script=THINKING)
    rows["langgraph"] = Client("langgraph_graph.py", CALCULATOR)
    rows["verifiers"] = Client("verifiers_agent.py", CALCULATOR)
    rows["codex"] = Client("codex.sh", CODEX)
    rows["mini-swe-agent"] = Client("mini_swe_agent.sh", MINI, "44")
    if shutil.which("curl") and shutil.which("jq"):
        rows["curl"] = Client("agent.sh", CALCULATOR)
    return rows


QUIET = {
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PYTHONPATH": str(AGENTS),
}
"""Nothing leaves the machine; and where verifiers finds the tools that it serves."""
BY_DEFAULT = ("openai", "anthropic", "litellm", "curl")
"""Rows whose packages the tests have anyway."""
CLIENTS = clients()


def is_default(name: str) -> bool:
    return name.startswith(BY_DEFAULT) and not name.endswith("-thinking")


def parameters() -> list:
    optional = (
        pytest.mark.clients,
        pytest.mark.skipif(FOLDER is None, reason="EP_RFT_CLIENTS names no folder with packages"),
    )
    return [
        pytest.param(client, id=name, marks=() if is_default(name) else optional)
        for name, client in CLIENTS.items()
    ]


@pytest.mark.parametrize("client", parameters())
async def test_what_an_agent_is_answered_is_what_was_sampled_and_is_kept_exactly(
    client: Client, zygote: Zygote, tmp_path: Path
) -> None:
    tokenizer = merging_tokenizer(APPENDS)
    policy = ScriptedPolicy(client.script, tokenizer)
    async with Gateway(policy, tokenizer) as gateway:
        session = gateway.session("rollout")
        variables = {
            "OPENAI_BASE_URL": session.base_url,
            "OPENAI_API_KEY": session.api_key,
            "ANTHROPIC_BASE_URL": session.anthropic_url,
            "ANTHROPIC_API_KEY": session.api_key,
            **QUIET,
        }
        ended = await asyncio.to_thread(run, client, variables, zygote, tmp_path)
        trajectory = await session.finish()
    assert ended.returncode == 0, ended.stderr
    assert any(line.endswith(client.answer) for line in ended.stdout.splitlines()), ended.stdout
    assert_is_what_went_over_the_seam(trajectory.segments, policy)
    metrics = trajectory.record.metrics
    assert len(trajectory.segments) == client.segments, metrics
    edited = {edit["call"] for edit in metrics.get("client_edits", ())}
    assert len(edited) == client.edits, metrics


def run(
    client: Client, variables: dict[str, str], zygote: Zygote, tmp: Path
) -> subprocess.CompletedProcess[str]:
    program, *options = client.program.split()
    arguments = [str(AGENTS / program), *options, TASK]
    folder = None if FOLDER is None else Path(FOLDER).resolve()
    if program.endswith(".py") and folder is None:
        return zygote.run(*arguments, program="python", env=variables, cwd=tmp)
    start = [{".py": "python", ".mjs": "node", ".sh": "sh"}[Path(program).suffix]]
    if folder is not None:
        # What is imported in JavaScript is looked for beside the file.
        arguments[0] = shutil.copy(AGENTS / program, tmp)
        (tmp / "node_modules").symlink_to(folder / "node" / "node_modules")
        packages = "verifiers" if program.startswith("verifiers") else "frameworks"
        start[0] = start[0].replace("python", str(folder / packages / "bin" / "python"))
        found = folder / packages / "bin", folder / "node" / "node_modules" / ".bin"
        variables["PATH"] = ":".join([*map(str, found), os.environ["PATH"]])
    return subprocess.run(
        [*start, *arguments],
        env={**os.environ, **variables},
        cwd=tmp,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def assert_is_what_went_over_the_seam(segments: Sequence[Segment], policy: ScriptedPolicy) -> None:
    """Every sampled id is trained once, in order, with its logprob, behind the prompt that was
    sent for it; nothing else is trained."""
    place = {
        np.float32(logprob): (call, index)
        for call, completion in enumerate(policy.sampled)
        for index, logprob in enumerate(completion.logprobs)
    }
    trained = []
    for segment in segments:
        ends = -1
        for at in np.flatnonzero(segment.loss_mask):
            call, index = place[segment.logprobs[at]]
            assert segment.tokens[at] == policy.sampled[call].token_ids[index]
            if index == 0:
                assert ends < at, "a call begins within another"
                ends = at + len(policy.sampled[call].token_ids) - 1
                assert segment.tokens[:at].tolist() == policy.asked[call][0]
            trained.append((call, index))
        assert ends == len(segment.tokens) - 1, "a segment ends with what was sampled"
        assert not segment.logprobs[segment.loss_mask == 0].any()
    assert sorted(trained) == sorted(place.values())
    assert all(
        [index for call, index in trained if call == number]
        == list(range(len(completion.token_ids)))
        for number, completion in enumerate(policy.sampled)
    )
