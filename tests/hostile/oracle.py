"""What a decoder may make of a damaged reply, judged without the decoder's own code.

Rules, first to last:
1. Anything but completions or a `SamplingError` is a crash.
2. Damage that must be refused (`Damaged.refused`) must not be accepted.
3. The truth is always right. Raw logprobs may be missing; they may not differ.
4. Where damage only takes away, nothing else is right. One exception: plain vLLM says ids and
   logprobs once each, so another order of either is another good reply.
5. Where damage may have put in other values, what was accepted must be what the document plainly
   says, read here by Python's `json`, and nothing in it may contradict it. Then it cannot be told
   from a reply that an honest server sent. Two things are told apart by nobody: a key that stands
   twice in one object (the last one counts), and a value that stands in no second place.
"""

from __future__ import annotations

import json
from typing import Any

from eval_protocol_rft.sampling._types import Completion, SamplingError
from tests.hostile.bases import Base, Exact, exact
from tests.hostile.mutations import Damaged

FLOAT32_MAX = 3.4028234663852886e38
NOISE = 1e-4


class UnreadableError(Exception):
    """The document is no reply, or contradicts itself."""


def problem_of(
    base: Base, damage: Damaged, outcome: list[Completion] | BaseException
) -> str | None:
    """What is wrong with an outcome, None where nothing is."""
    if isinstance(outcome, SamplingError):
        return None
    if isinstance(outcome, BaseException):
        return f"crash: {type(outcome).__name__}: {outcome}"
    accepted = exact(outcome)
    if damage.refused:
        return "accepted what must be refused"
    if same(accepted, base.truth) or (damage.may_reorder and _reordered(accepted, base.truth)):
        return None
    if damage.takes:
        return f"accepted neither the truth nor an error: {accepted} for {base.truth}"
    try:
        read = reading(base, damage.body)
    except (UnreadableError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"accepted {accepted}, but the reply cannot be read so: {error!r}"
    return None if same(accepted, read) else f"accepted {accepted}, but the reply says {read}"


def same(accepted: Exact, truth: Exact) -> bool:
    """Whether a trainer would see the same; raw logprobs may be missing from `accepted`."""
    return len(accepted) == len(truth) and all(
        (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and a[2] in (None, b[2])
        for a, b in zip(accepted, truth, strict=True)
    )


def _reordered(accepted: Exact, truth: Exact) -> bool:
    return all(
        sorted(a[0]) == sorted(b[0]) and sorted(a[1]) == sorted(b[1]) and a[3] == b[3]
        for a, b in zip(accepted, truth, strict=True)
    )


def reading(base: Base, body: bytes) -> Exact:
    """What the document says, as a person would read it.

    Raises: `UnreadableError` or what Python raises for a missing key or a wrong type, where it is
    no reply or contradicts itself.
    """
    text = body.decode("utf-8", "surrogateescape")
    reply = _joined(text) if base.stream and "data:" in text else json.loads(text)
    _check(reply.get("object") in (None, "text_completion"), "object")
    _check(not reply.get("error"), "error")
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    _check([choice["index"] for choice in choices] == list(range(base.n)), "indices")
    read = tuple(_choice(base, choice) for choice in choices)
    usage = reply.get("usage") or {}
    _check_counts(base, choices, usage, sum(len(one[0]) for one in read))
    return read


def _choice(base: Base, choice: Any) -> Any:
    raw_output, logprobs = choice.get("raw_output") or {}, choice["logprobs"]
    for echoed in (choice.get("prompt_token_ids"), raw_output.get("prompt_token_ids")):
        _check(echoed is None or echoed == list(base.prompt), "prompt")
    _check(choice["finish_reason"] in ("stop", "length"), "finish_reason")
    [ids, *others] = _told_ids(choice)
    _check(all(other == ids for other in others), "ids differ")
    _check(all(type(one) is int and 0 <= one < 2**31 for one in ids), "ids")
    _check(base.params.max_tokens is None or len(ids) <= base.params.max_tokens, "max_tokens")
    content = logprobs.get("content")
    if content is not None:
        sampling = [entry.get("sampling_logprob") for entry in content]
        raw = [entry.get("logprob") for entry in content]
        offsets = [entry.get("text_offset") for entry in content]
        if set(sampling) == {None}:
            _check(base.params.temperature == 1.0, "raw for sampling")
            sampling = raw
    else:
        sampling = raw = logprobs["token_logprobs"]
        offsets = logprobs.get("text_offset") or []
    offsets = [offset for offset in offsets if offset is not None]
    _check(offsets == sorted(offsets), "offsets")
    _check(len(sampling) == len(ids) > 0, "counts")
    for value in sampling:
        _check(type(value) in (int, float) and -FLOAT32_MAX <= value <= NOISE, f"logprob {value}")
    # Floats: an integer of many digits is rounded, as any number in JSON may be.
    told = None if raw.count(None) == len(raw) else tuple(map(float, raw))
    return tuple(ids), tuple(map(float, sampling)), told, choice["finish_reason"]


def _told_ids(choice: Any) -> list[list[int]]:
    """Every list of sampled ids in a choice; tokens written as ids tell logprobs as well."""
    logprobs, raw_output = choice["logprobs"], choice.get("raw_output") or {}
    content, tokens = logprobs.get("content"), logprobs.get("tokens") or []
    told = [
        None if content is None else [entry["token_id"] for entry in content],
        choice.get("token_ids"),
        raw_output.get("completion_token_ids"),
        logprobs.get("token_ids"),
    ]
    if tokens and tokens[0].startswith("token_id:"):
        told.append([int(token.removeprefix("token_id:")) for token in tokens])
        if logprobs.get("top_logprobs") is not None and content is None:
            tops = zip(logprobs["top_logprobs"], tokens, strict=True)
            _check([top[token] for top, token in tops] == logprobs["token_logprobs"], "tops")
    return [ids for ids in told if ids is not None]


def _check_counts(base: Base, choices: Any, usage: Any, sampled: int) -> None:
    echoed = all(
        choice.get("prompt_token_ids") or (choice.get("raw_output") or {}).get("prompt_token_ids")
        for choice in choices
    )
    _check(echoed or usage.get("prompt_tokens") in (None, len(base.prompt)), "prompt count")
    sources = min(
        sum(
            source is not None
            for source in (
                choice["logprobs"].get("content"),
                choice.get("token_ids"),
                (choice.get("raw_output") or {}).get("completion_token_ids"),
                choice["logprobs"].get("token_ids"),
            )
        )
        for choice in choices
    )
    alone = sources < 2 and not base.params.stop
    _check(not alone or usage.get("completion_tokens") in (None, sampled), "count")


def _joined(text: str) -> Any:
    """A stream as the whole reply that it stands for."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    events = [
        "\n".join(line[5:].removeprefix(" ") for line in block.split("\n") if line[:5] == "data:")
        for block in lines.split("\n\n")[:-1]
    ]
    *documents, done = [data for data in events if data]
    _check(done == "[DONE]", "no [DONE]")
    whole: dict[str, Any] = {"choices": []}
    for chunk in map(json.loads, documents):
        _check(not chunk.get("error"), "error")
        for name in ("id", "object"):
            known, new = whole.get(name), chunk.get(name)
            _check(not (known and new) or known == new, f"two values of {name}")
            whole[name] = known or new
        whole["usage"] = chunk.get("usage") or whole.get("usage")
        for choice in chunk["choices"]:
            _join_choice(whole["choices"], choice)
    return whole


def _join_choice(choices: list[Any], new: Any) -> None:
    known = next((choice for choice in choices if choice["index"] == new["index"]), None)
    if known is None:
        choices.append(new)
        return
    for name in ("prompt_token_ids", "finish_reason"):
        before, after = known.get(name), new.get(name)
        _check(not (before and after) or before == after, f"two values of {name}")
        known[name] = before or after
    known["raw_output"] = new.get("raw_output") or known.get("raw_output")
    if new.get("token_ids") is not None:
        known["token_ids"] = (known.get("token_ids") or []) + new["token_ids"]
    if new.get("logprobs") is None:
        return
    if known.get("logprobs") is None:
        known["logprobs"] = {}
    for name, values in new["logprobs"].items():
        if values is not None:
            known["logprobs"][name] = (known["logprobs"].get(name) or []) + values


def _check(holds: object, what: str) -> None:
    if not holds:
        raise UnreadableError(what)
