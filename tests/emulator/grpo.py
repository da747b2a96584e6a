"""What a fine-tuning step does with a data set of text rows: GRPO on what it makes of the text.

The text is tokenized anew and the end of turn put behind it, as a trainer must that has no ids.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def train_on_rows(
    model: Any, rows: list[dict[str, Any]], job: dict[str, Any], *, tokenizer: Any
) -> Any:
    """A trained copy of `model`: `epochs` AdamW steps on all of the rows' samples."""
    torch.set_num_threads(1)
    trained = copy.deepcopy(model)
    config = job["trainingConfig"]
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config["learningRate"], betas=(0.9, 0.95), weight_decay=0.0
    )
    examples = [example for row in rows for example in _examples(row["samples"], tokenizer)]
    batch = _padded(examples)
    with torch.no_grad():
        old = _logprobs(model, batch.ids)
    for _ in range(config["epochs"]):
        optimizer.zero_grad()
        _loss(_logprobs(trained, batch.ids), old, batch).backward()
        optimizer.step()
    return trained


class _Batch(NamedTuple):
    """[N, T] ids, and [N, T-1] advantages of their targets and where those were sampled."""

    ids: Tensor
    advantages: Tensor
    sampled: Tensor


def _examples(
    samples: list[dict[str, Any]], tokenizer: Any
) -> list[tuple[list[int], list[int], float]]:
    """(prompt ids, completion ids, advantage) of a group whose scores differ."""
    scores = torch.tensor([sample["evals"]["score"] for sample in samples])
    if len(scores) < 2 or scores.std() < 1e-8:
        return []
    advantages = ((scores - scores.mean()) / scores.std()).tolist()
    found = []
    for sample, advantage in zip(samples, advantages, strict=True):
        *messages, answer = sample["messages"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        completion = tokenizer.encode(answer["content"] + tokenizer.eos_token)
        found.append((prompt, completion, advantage))
    return found


def _padded(examples: list[tuple[list[int], list[int], float]]) -> _Batch:
    width = max(len(prompt) + len(completion) for prompt, completion, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    advantages, sampled = torch.zeros(len(examples), width), torch.zeros(len(examples), width)
    for i, (prompt, completion, advantage) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        advantages[i, len(prompt) : end] = advantage
        sampled[i, len(prompt) : end] = 1.0
    return _Batch(ids, advantages[:, 1:], sampled[:, 1:])


def _logprobs(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -losses.view(len(ids), -1)


def _loss(current: Tensor, old: Tensor, batch: _Batch) -> Tensor:
    """GRPO (arXiv:2402.03300, eq. 3) without its KL term, the mean over all sampled tokens."""
    ratio = (current - old).exp()
    gains = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    return -(gains * batch.sampled).sum() / batch.sampled.sum()
