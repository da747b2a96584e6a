"""What to train on of a session: its tree of turns as the segments of one trajectory.

Invariant: under `first` every sampled token is trained once, in the first branch that has it and
behind exactly the ids it was sampled behind; further branches have it as context. Under `each` it
is trained in every branch; under `longest` one branch alone is trained. The record says which.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval_protocol_rft._segments import Segment
from eval_protocol_rft.episodes._turns import Turn, segments_of
from eval_protocol_rft.episodes.gateway._settings import Shared


def branches_of(turns: Sequence[Turn]) -> list[list[Turn]]:
    """[B] the paths to the turns that nothing was sampled behind: the branch that began first
    stands first, as in a walk through the tree.

    Args:
        turns: all of a session, in the order in which they were sampled.
    """
    order = {id(turn): number for number, turn in enumerate(turns)}
    behind = {id(turn.prompt.behind) for turn in turns}
    paths = [turn.path() for turn in turns if id(turn) not in behind]
    return sorted(paths, key=lambda path: [order[id(turn)] for turn in path])


def trained_branches(turns: Sequence[Turn], shared: Shared) -> list[list[Turn]]:
    """[B] the branches that are trained: all, or the one with the most sampled tokens."""
    branches = branches_of(turns)
    if shared == "longest" and branches:
        return [max(branches, key=_sampled)]
    return branches


def segments_in(branches: Sequence[Sequence[Turn]], shared: Shared) -> list[Segment]:
    """The segments of a trajectory, in the order of its branches.

    Args:
        branches: as `trained_branches` gives them.
        shared: `first` or `longest`: what an earlier branch has trained is context in a later one;
            `each`: it is trained again.
    """
    segments: list[Segment] = []
    trained: set[int] = set()
    for path in branches:
        done = frozenset() if shared == "each" else frozenset(trained)
        segments += segments_of(path, lambda turn, done=done: id(turn) not in done)  # type: ignore[misc]
        trained.update(map(id, path))
    return segments


def _sampled(path: Sequence[Turn]) -> int:
    return sum(len(turn.completion.token_ids) for turn in path)
