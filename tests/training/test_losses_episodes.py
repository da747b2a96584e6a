"""The losses, and the layout of their forward pass, on episodes of several segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training._batch import build_batch
from tests.training_episodes import TWO_SEGMENTS, episodes_row

torch = pytest.importorskip("torch")

ONE_TURN = [[(3, 4)]]


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_a_batch_of_episodes_has_the_loss_of_a_loop_over_its_segments(normalization: Any) -> None:
    """On-policy importance sampling: sum of -ratio * advantage, by hand from the record."""
    from eval_protocol_rft.training.losses._objective import make_loss

    shapes = [TWO_SEGMENTS, ONE_TURN, [[(3, 1)], [(2, 2), (1, 3)], [(5, 1)]]]
    row = episodes_row("a", shapes, [1.0, 0.0, 0.5], seed=3)
    batch = build_batch(
        [row],
        algorithm="importance_sampling",
        normalization=normalization,
        constant_length=7 if normalization == "constant" else None,
    )
    rng = np.random.default_rng(0)
    current = [torch.tensor(-rng.random(len(d)), dtype=torch.float64) for d in batch.datums]
    loss, _ = make_loss(batch.loss_fn, batch.loss_fn_config)(batch.datums, current)

    drawn = iter(current)
    sums, counts = [], []
    for segments in row["execution_metadata"]["extra"]["trajectories"]:
        sums.append(0.0)
        counts.append(0)
        for segment in segments:
            ours = next(drawn)
            for t in range(1, len(segment["tokens"])):
                if segment["loss_mask"][t]:
                    sums[-1] += float(np.exp(float(ours[t - 1]) - segment["logprobs"][t]))
                    counts[-1] += 1
    advantages = [0.5, -0.5, 0.0]
    by_episode = {
        "token": [1 / sum(counts)] * 3,
        "sequence": [1 / (3 * count) for count in counts],
        "constant": [1 / (3 * 7)] * 3,
    }[normalization]
    expected = -sum(a * s * f for a, s, f in zip(advantages, sums, by_episode, strict=True))
    assert counts == [6, 4, 7]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_every_sampled_target_follows_the_very_tokens_of_its_own_segment() -> None:
    """Where segments share a prompt row by row: what each target's logits see, token by token."""
    from eval_protocol_rft.training.losses._forward import bundled, sharing_prompts

    shapes = [TWO_SEGMENTS, ONE_TURN, [[(3, 1), (2, 2)], [(4, 2)]]]
    batch = build_batch([episodes_row("a", shapes, [1.0, 0.0, 0.5])])
    bundles = bundled(batch.datums)
    ordered = [batch.datums[i] for bundle in bundles for i in bundle]
    layout = sharing_prompts([[batch.datums[i] for i in bundle] for bundle in bundles])
    places = zip(layout.rows, layout.columns, layout.targets, strict=True)
    for datum in ordered:
        for t in np.flatnonzero(datum.mask):
            at, column, target = next(places)
            seen = np.flatnonzero(layout.attended[at, 0, column])
            ids = layout.input_ids[at, seen][np.argsort(layout.positions[at, seen])]
            assert ids.tolist() == datum.input_tokens[: t + 1].tolist()
            assert target == datum.target_tokens[t]
    assert next(places, None) is None
