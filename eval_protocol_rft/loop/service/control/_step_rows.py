"""Rows of text as prompt groups of token ids, for fine-tuning steps.

The text is tokenized anew, as a trainer must that has no ids: every assistant turn stands behind
the prompt that the chat template makes of the turns before it, and ends with the template's end of
turn.

Invariant: every sample of a row is a trajectory with its own reward, or the row is an error that
names it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval_protocol_rft import rollout, training
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import LoadedTokenizer


class StepError(EvalProtocolRftError, ValueError):
    """The rows are nothing that a step can train on."""


def prompt_group(
    number: int,
    samples: Sequence[Mapping[str, Any]],
    tokenizer: LoadedTokenizer,
    ends: frozenset[int],
    weights: Mapping[str, float],
) -> training.PromptGroup:
    """One row's samples, tokenized, with their rewards.

    Args:
        number: of the row, from 1.
        samples: the row's.
        tokenizer: its chat template renders.
        ends: ids with which a turn ends.
        weights: of `evals` by name; without any, the reward is their sum.

    Raises:
        StepError: a sample cannot be rendered, or has no such score.
    """
    trajectories = []
    for i, sample in enumerate(samples):
        where = f"row {number}, samples[{i}]"
        try:
            segments = turns_to_segments(sample["messages"], sample.get("tools"), tokenizer, ends)
        except rollout.PromptError as error:
            raise StepError(f"{where}: {error}") from error
        trajectories.append(
            training.Trajectory(
                tokens=segments[0].tokens,
                logprobs=segments[0].logprobs,
                loss_mask=segments[0].loss_mask,
                more=tuple(segments[1:]),
                reward=_reward(sample["evals"], weights, where),
                row_id=str(number),
                completion=i,
            )
        )
    return training.PromptGroup(
        key=number, trajectories=tuple(trajectories), asked=len(trajectories), name=f"row {number}"
    )


def _reward(evals: Mapping[str, float], weights: Mapping[str, float], where: str) -> float:
    if not weights:
        return float(sum(evals.values()))
    if missing := [name for name in weights if name not in evals]:
        raise StepError(
            f"{where}: rewardWeights names {missing[0]!r}, and evals has {', '.join(evals)}"
        )
    return float(sum(weight * evals[name] for name, weight in weights.items()))


def turns_to_segments(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
    ends: frozenset[int],
) -> list[training.Segment]:
    """A conversation as token ids, every assistant turn sampled. It is one segment, unless the
    chat template rewrites earlier turns.

    Raises:
        PromptError: the chat template cannot render it.
    """
    chat = rollout.chat_messages(messages, tokenizer)
    segments: list[tuple[list[int], list[float]]] = []
    for place, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = list(rollout.render_chat(chat[:place], tools, tokenizer, {}))
        turn = _turn_ids(chat[: place + 1], tools, tokenizer, ends)
        if not segments or prompt[: len(segments[-1][0])] != segments[-1][0]:
            segments.append(([], []))
        tokens, mask = segments[-1]
        mask += [0.0] * (len(prompt) - len(tokens)) + [1.0] * len(turn)
        tokens[:] = [*prompt, *turn]
    return [
        training.Segment(
            tokens=np.array(tokens),
            loss_mask=np.array(mask, np.float32),
            logprobs=np.zeros(len(mask), np.float32),
        )
        for tokens, mask in segments
    ]


def _turn_ids(
    chat: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: LoadedTokenizer,
    ends: frozenset[int],
) -> list[int]:
    """What the assistant said last, as the chat template writes it, up to the end of its turn."""
    read = rollout.as_template_reads(chat, tools, tokenizer)

    def text(messages: Sequence[Any], *, generate: bool) -> str:
        known: Any = tokenizer.tokenizer
        return str(
            known.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generate
            )
        )

    asked, answered = text(read[:-1], generate=True), text(read, generate=False)
    said = chat[-1].get("content")
    if answered.startswith(asked):
        said = answered[len(asked) :]
    elif chat[-1].get("tool_calls") or not isinstance(said, str):
        raise rollout.PromptError(
            f"the chat template of {tokenizer.name!r} does not write the assistant's turn behind "
            "its prompt"
        )
    ids = list(tokenizer.tokenizer.encode(said, add_special_tokens=False))
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return [*ids, tokenizer.tokenizer.eos_token_id]


def end_ids(tokenizer: Any, module: Any) -> frozenset[int]:
    """Ids with which a model ends its turn."""
    found = {tokenizer.eos_token_id}
    for config in (module.config, getattr(module, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return frozenset(token for token in found if token is not None)


def with_template(tokenizer: Any, template: str | None) -> LoadedTokenizer:
    """A tokenizer with its own chat template, or with `template`."""
    if template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return LoadedTokenizer.wrap(tokenizer)
