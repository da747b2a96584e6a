"""Whatever is done to a reply, the decoder gives the truth, another honest reply, or a typed error.

`HYPOTHESIS_PROFILE=long` looks longer; `scripts/fuzz_decoder.py` looks for as long as one likes.
What can and what cannot be told apart is written down in `tests/hostile/oracle.py`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._replies import error_in_body, status_error
from eval_protocol_rft.sampling._types import Completion, ContractError, SamplingError
from tests.hostile.bases import Base, bases
from tests.hostile.mutations import Damaged, damaged
from tests.hostile.oracle import problem_of, reading, same

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_decoder.py"
EXAMPLES = 200_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1500
thorough = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
some_base = st.sampled_from(bases())
some_rng = st.randoms(use_true_random=False)


def outcome_of(base: Base, body: bytes) -> list[Completion] | BaseException:
    try:
        return base.decoded(body)
    except Exception as error:  # noqa: BLE001 - of any kind: the oracle judges
        return error


@thorough
@given(base=some_base, rng=some_rng)
def test_a_damaged_reply_is_the_truth_or_as_good_as_true_or_an_error(base, rng):
    damage = damaged(base, rng)
    problem = problem_of(base, damage, outcome_of(base, damage.body))
    assert problem is None, f"[{base.name}] {damage.what}: {problem}"


@thorough
@given(base=some_base, rng=some_rng)
def test_a_damaged_reply_read_as_the_other_kind_never_crashes(base, rng):
    """A stream where a whole reply was asked for, and the other way round."""
    other = decode_reply if base.stream else decode_stream
    try:
        other(damaged(base, rng).body, base.prompt, base.params, n=base.n)
    except SamplingError:
        return


@thorough
@given(body=st.binary(max_size=300))
def test_any_bytes_are_an_error(body):
    for base in (bases()[0], bases()[4]):
        assert isinstance(outcome_of(base, body), SamplingError)


@thorough
@given(
    base=some_base,
    rng=some_rng,
    status=st.integers(100, 599),
    headers=st.dictionaries(st.sampled_from(["Retry-After", "Date"]), st.text(max_size=40)),
)
def test_any_body_and_headers_with_a_status_are_an_error(base, rng, status, headers):
    body = damaged(base, rng).body
    error = status_error(status, body, headers, now=datetime(2026, 1, 2, tzinfo=UTC))
    assert isinstance(error, SamplingError)
    error_in_body(body)


@pytest.mark.parametrize(
    "base", [one for one in bases() if one.name.endswith(("t1", "as_ids", "n1", "seed 1"))], ids=str
)
def test_a_reply_cut_off_anywhere_is_worth_another_attempt(base):
    """Not a contract error, which is final: also within a number, an escape or a letter's bytes."""
    for cut in range(len(base.body.rstrip())):
        error = outcome_of(base, base.body[:cut])
        assert isinstance(error, SamplingError), f"cut at {cut}: {error!r}"
        assert error.kind == "connection", f"cut at {cut}: {error!r}"


@pytest.mark.parametrize("more", [b"}", b"]", b"x", b"\x00", b"-", b"0"])
def test_a_reply_with_more_after_its_end_is_no_cut_off_one(more):
    assert type(outcome_of(WHOLE, WHOLE.body + more)) is ContractError


@pytest.mark.parametrize(
    "zone", ["+99999999999999999999", "+9999", "-2400", "GMT", "", "+00:00", "Z"]
)
def test_a_date_with_any_time_zone_is_read_or_ignored(zone):
    headers = {"Retry-After": f"Fri, 02 Jan 2026 03:04:05 {zone}"}
    error = status_error(503, b"", headers, now=datetime(2026, 1, 2, tzinfo=UTC))
    assert error.retry_after is None or error.retry_after >= 0


WHOLE = next(base for base in bases() if base.name == "fireworks, seed 1")
ALONE = next(base for base in bases() if base.name == "vllm, seed 1")
STREAM = next(base for base in bases() if base.name == "vllm stream, seed 1")


@pytest.mark.parametrize("base", bases(), ids=str)
def test_the_oracle_reads_undamaged_replies_as_the_decoder_does(base):
    assert len(base.truth) == base.n
    assert all(len(ids) == len(logprobs) > 0 for ids, logprobs, *_ in base.truth)
    assert same(base.truth, reading(base, base.body))


def lax(base: Base, body: bytes) -> list[Completion]:
    """What a client does that takes what it gets: no second look, and zeros where nothing is."""
    text = body.decode("utf-8", "replace")
    documents = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    ids, logprobs, reason = [], [], "stop"
    for document in documents if base.stream else [text]:
        for choice in json.loads(document).get("choices") or []:
            ids += choice.get("token_ids") or []
            logprobs += choice["logprobs"]["token_logprobs"]
            reason = choice.get("finish_reason") or reason
    logprobs = [value or 0.0 for value in logprobs[: len(ids)]]
    logprobs += [0.0] * (len(ids) - len(logprobs))
    return [Completion(token_ids=ids, logprobs=logprobs, finish_reason=reason)]


@pytest.mark.parametrize("base", [ALONE, STREAM], ids=str)
def test_the_oracle_finds_a_client_that_takes_what_it_gets(base):
    """The oracle can say no: to dropped ids, padded logprobs, streams without an end."""
    problems = []
    for number in range(1500):
        damage = damaged(base, random.Random(number))
        try:
            outcome = lax(base, damage.body)
        except (SamplingError, ValueError, LookupError, TypeError, AttributeError):
            continue
        problems.append(problem_of(base, damage, outcome))
    found = [problem for problem in problems if problem]
    assert len(found) > 50
    assert any("neither the truth nor an error" in problem for problem in found)
    assert any("cannot be read so" in problem for problem in found)
    if base.stream:
        assert "accepted what must be refused" in found


def test_the_oracle_calls_any_other_exception_a_crash():
    damage = Damaged(b"{}", "", takes=True)
    assert "crash: StopIteration" in problem_of(WHOLE, damage, StopIteration())
    assert problem_of(WHOLE, damage, SamplingError("no")) is None


def test_the_script_counts_and_repeats_a_case_by_its_seed():
    def told(*options: str) -> list[str]:
        command = [sys.executable, str(SCRIPT), *options]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        return ran.stdout.splitlines()[1:]

    first, second = told("--cases", "40", "--seed", "3"), told("--cases", "1", "--seed", "3:39")
    assert first[-1] == second[-1] == "0 wrong"
    assert sum(int(part.split()[1]) for part in first[0].split(", ")) == 40
    assert second[0].split()[0] in first[0]
