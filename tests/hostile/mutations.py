"""Damage to a reply: at the level of its JSON, of its events, of its bytes. Pure, from an rng.

Invariant: damage marked `takes` only takes away, repeats, reorders or makes nonsense of what was
there; it puts no other sensible value in. After it a decoder may give the truth or an error,
nothing else. Other damage may make another reply that is just as good.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

from tests.hostile.bases import Base, Path, bases

NOT_NUMBERS: list[Any] = [float("nan"), float("inf"), float("-inf")]
OTHER_TYPES: list[Any] = ["7", "", True, False, 1.5, [], {}, "NaN", {"a": 1}, [[1]], [None]]
NUMBERS: list[Any] = [0, -0.0, -1, 1, 7, -0.25, 1e-5, 0.5, 2**31, 2**63, 2**64, -(2**63), 10**40]
NUMBERS += [1e308, -1e308, -3.39e38, -3.5e38, 5e-324, 1e16]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A damaged body."""

    body: bytes
    what: str
    """For the report: what was done, where."""
    takes: bool
    """See the module."""
    refused: bool = False
    """Must be an error, even though nothing of the tokens was touched."""
    may_reorder: bool = False
    """It put a list that plain vLLM says once in another order."""


def damaged(base: Base, rng: random.Random) -> Damaged:
    """One damaged reply; most often damaged once, so that everything else bears witness."""
    kinds = [_json_once] * 5 + [_json_twice] * 2 + [_bytes] * 3
    return rng.choice(kinds + [_events] * 5 if base.stream else kinds)(base, rng)


def _json_once(base: Base, rng: random.Random) -> Damaged:
    at = rng.randrange(len(base.documents))
    document = json.loads(base.documents[at])
    path = rng.choice(base.paths[at])
    kind, takes = _hurt(document, path, rng)
    once = base.said_once and kind in ("reorder", "rotate")
    return Damaged(
        body=_with_document(base, at, _written(document, rng)),
        what=f"{kind} at {at}:{path}",
        takes=takes,
        may_reorder=once and path[-1] in ("token_ids", "token_logprobs"),
    )


def _json_twice(base: Base, rng: random.Random) -> Damaged:
    at = rng.randrange(len(base.documents))
    document = json.loads(base.documents[at])
    done = []
    for _ in range(rng.randint(2, 4)):
        path = rng.choice(base.paths[at])
        try:
            kind, _ = _hurt(document, path, rng)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # what stood there is gone
        done.append(f"{kind} at {at}:{path}")
    return Damaged(_with_document(base, at, _written(document, rng)), "; ".join(done), takes=False)


def _hurt(document: Any, path: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage the value at `path` in place; what was done, and whether it only takes."""
    parent, last = _get(document, path[:-1]), path[-1]
    value = parent[last]
    kinds = ["drop", "null", "not a number", "type", "swap"]
    if isinstance(parent, list):
        kinds += ["double", "cut"]
    else:
        kinds += ["rename", "take another's name"]
    if isinstance(value, list) and len(value) > 1:
        kinds += ["reorder", "rotate"] * 2
    if isinstance(value, int | float) and not isinstance(value, bool):
        kinds += ["number", "number", "wiggle"]
    kind = rng.choice(kinds)
    if kind == "drop":
        del parent[last]
    elif kind == "null":
        parent[last] = None
    elif kind == "not a number":
        parent[last] = rng.choice(NOT_NUMBERS)
    elif kind == "type":
        # A number for a number would be another sensible value.
        parent[last] = rng.choice([o for o in OTHER_TYPES if type(o) is not type(value)])
        if isinstance(value, int | float) and type(parent[last]) is float:
            parent[last] = "1.5"
    elif kind == "swap":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], value
    elif kind == "double":
        parent.insert(int(last), copy.deepcopy(value))
    elif kind == "cut":
        del parent[last:]
    elif kind == "rename":
        parent[f"{last}s"] = parent.pop(last)
    elif kind == "take another's name":
        parent[rng.choice(list(parent))] = value
        parent.pop(last)
    elif kind == "reorder":
        rng.shuffle(value)
    elif kind == "rotate":
        value.append(value.pop(0))
    elif kind == "number":
        parent[last] = rng.choice(NUMBERS)
    else:
        parent[last] = value + 1 if isinstance(value, int) else value * 1.0000001 - 1e-12
    return kind, kind not in ("swap", "take another's name", "number", "wiggle")


def _get(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def _written(document: Any, rng: random.Random) -> bytes:
    """As one or another server writes JSON."""
    if rng.random() < 0.2:
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.dumps(document, separators=(",", ":")).encode()


def _with_document(base: Base, at: int, document: bytes) -> bytes:
    if not base.stream:
        return document
    events = list(base.events)
    events[at] = b"data: " + document + b"\n\n"
    return b"".join(events)


def _events(base: Base, rng: random.Random) -> Damaged:
    events, takes, refused = list(base.events), True, False
    at = rng.randrange(len(events))
    kinds = ["drop", "double", "move", "cut", "split", "no done", "foreign", "error", "cut off"]
    kind = rng.choice([*kinds, "field name", "join", "replace", "reverse"])
    if kind == "drop":
        del events[at]
    elif kind == "double":
        events.insert(at, events[at])
    elif kind == "move":
        events.insert(rng.randrange(len(events)), events.pop(at))
    elif kind == "cut":
        events[at] = events[at][: rng.randrange(len(events[at]))] + b"\n\n"
    elif kind == "split":
        where = rng.randrange(len(events[at]))
        events[at] = events[at][:where] + rng.choice((b"\n\n", b"\n", b"\r")) + events[at][where:]
    elif kind == "no done":
        events, refused = events[:-1], True
    elif kind == "foreign":
        others = [one for one in bases() if one.stream and one.name != base.name]
        # Beside one of ours, or in its place: then the counts fit.
        events[at : at + rng.randrange(2)] = [rng.choice(rng.choice(others).events[:-1])]
    elif kind == "error":
        at = min(at, len(events) - 1)
        events[at:at] = [b'data: {"error":{"message":"died"},"choices":[]}\n\n']
        refused = True
    elif kind == "cut off":
        body = b"".join(events)
        # Whoever has `[DONE]` and the end of its line has all.
        cut = rng.randrange(len(body) - 2)
        return Damaged(body[:cut], f"cut off after {cut}", takes=True, refused=True)
    elif kind == "field name":
        events[at] = rng.choice((b"dat: ", b"Data: ", b"xdata: ")) + events[at][6:]
    elif kind == "join":
        events[at] = events[at].removesuffix(b"\n\n") + rng.choice((b"\n", b""))
    elif kind == "replace":
        events[at] = rng.choice(events)
        takes = False  # one dropped and one doubled: the counts fit again
    else:
        events[:-1] = events[-2::-1]
    return Damaged(b"".join(events), f"{kind} at {at}", takes=takes, refused=refused)


def _bytes(base: Base, rng: random.Random) -> Damaged:
    body = bytearray(base.body)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(body) + 1)
        end = min(len(body), at + rng.choice((1, 1, 2, 8, 60, 400)))
        kind = rng.choice(("flip", "delete", "insert", "digit", "copy", "cut off", "overwrite"))
        if kind == "flip" and at < len(body):
            body[at] ^= 1 << rng.randrange(8)
        elif kind == "delete":
            del body[at:end]
        elif kind == "insert":
            body[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 6)))
        elif kind == "digit":
            digits = [place for place in range(at, end) if 48 <= body[place] <= 57]
            for place in digits[:1]:
                body[place] = 48 + rng.randrange(10)
        elif kind == "copy":
            to = rng.randrange(len(body) + 1)
            body[to:to] = body[at:end]
        elif kind == "cut off":
            del body[at:]
        else:
            to = rng.randrange(len(body) + 1)
            body[to : to + end - at] = body[at:end]
        done.append(f"{kind} at {at}")
        if not body:
            break
    return Damaged(bytes(body), "; ".join(done), takes=False)
