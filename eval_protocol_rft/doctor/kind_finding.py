"""What `doctor` says of the kind of a server's logprobs, with the exact setting. Pure."""

from __future__ import annotations

from typing import Literal

from eval_protocol_rft.doctor.findings import Finding, skipped
from eval_protocol_rft.sampling.logprob_kind import LOWER_TEMPERATURE, TOLERANCE, KindMeasured
from eval_protocol_rft.sampling.types import LogprobsMode

KIND = "logprob kind"


def kind_finding(
    measured: KindMeasured, *, named: bool, told: LogprobsMode | None, temperature: float
) -> Finding:
    """The verdict, and the exact setting.

    Args:
        named: the server sends a logprob that it calls the one of sampling.
        told: what the user said of the server.
        temperature: the one to train at.
    """
    told_by = "named as such" if named else "unnamed"
    errors = (
        f"{measured.tokens} tokens at temperatures 1 and {LOWER_TEMPERATURE:g} differ from "
        f"sampling logprobs by {measured.sampling_error:.2g} nats, from raw ones by "
        f"{measured.raw_error:.2g}"
    )
    numbers = {"tokens": float(measured.tokens)}
    if measured.tokens:
        numbers |= {"sampling_error": measured.sampling_error, "raw_error": measured.raw_error}
    verdict, advice = _judged(measured.kind, named=named, told=told, temperature=temperature)
    if verdict == "skipped":
        return skipped(KIND, f"first tokens are too certain to tell; {told_by}", advice)
    return Finding(
        name=KIND,
        verdict=verdict,
        measured=f"{measured.kind}, {told_by}: {errors}",
        bar=f"sampling within {TOLERANCE:g} nats, or raw at temperature 1",
        advice=advice,
        numbers=numbers,
    )


_SAY_PROCESSED = (
    '--logprobs-mode processed_logprobs (completion_params: "logprobs_mode": "processed_logprobs")'
)
_START_PROCESSED = (
    f"start it as `vllm serve MODEL --logprobs-mode processed_logprobs` and pass {_SAY_PROCESSED}"
)


def _judged(
    kind: str, *, named: bool, told: LogprobsMode | None, temperature: float
) -> tuple[Literal["pass", "warn", "fail", "skipped"], str]:
    at_one = temperature == 1.0
    if kind == "neither":
        return "fail", (
            "They belong to neither distribution: does the server cut or reshape it (top_p, top_k, "
            "penalties of its own), or serve replicas of different weights? Importance ratios made "
            "of them would be wrong."
        )
    if kind == "unknown":
        if at_one or named:
            return "skipped", "At temperature 1 the two are equal." if at_one else ""
        return (
            "warn",
            f"They may be raw: sample at temperature 1, or {_START_PROCESSED}.",
        )
    if kind == "sampling":
        if told == "raw_logprobs":
            return (
                "fail",
                f"raw_logprobs is wrong of this server: pass {_SAY_PROCESSED}.",
            )
        if named or told == "processed_logprobs":
            return "pass", ""
        return ("pass" if at_one else "warn"), f"For any temperature but 1 pass {_SAY_PROCESSED}."
    if named:
        return "fail", (
            "The server calls them the logprobs of sampling, but the temperature is not in them. "
            "Sample at temperature 1, where the two are equal."
        )
    if told == "processed_logprobs":
        return "fail", (
            "--logprobs-mode processed_logprobs is wrong of this server: leave it out and sample "
            f"at temperature 1, or {_START_PROCESSED}."
        )
    if at_one:
        return (
            "pass",
            f"Right at temperature 1. For any other {_START_PROCESSED}.",
        )
    return "fail", f"Sample at temperature 1, or {_START_PROCESSED}."
