"""A policy that plays agents' parts from a script, and keeps all that went over the seam."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, SamplingParams
from tests.serving import ScriptedSampler

Script = Mapping[str, Sequence[str]]
"""What is answered, by a text that the prompt has in it, then by the number of the assistant's
turns in the prompt. `{last}` is the last number in the prompt, so that what an agent's tools find
reaches its answer."""


def hermes(name: str, arguments: str) -> str:
    """A call as Hermes and Qwen write it, with the arguments' very text."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class ScriptedPolicy(ScriptedSampler):
    """Samples the script's text one character a token, as its tokenizer would never encode it: who
    encodes text again has other ids. No two tokens have the same logprob."""

    def __init__(self, script: Script, tokenizer: LoadedTokenizer) -> None:
        super().__init__(self._answer)
        self.lines = script
        self.tokenizer = tokenizer
        self.sampled: list[Completion] = []
        """In the order of `asked`."""
        self.drawn = 0

    def _answer(
        self, prompt_ids: list[int], params: SamplingParams, seed: int | None
    ) -> Completion:
        prompt = self.tokenizer.tokenizer.decode(prompt_ids)
        turn = prompt.count("<|im_start|>assistant\n") - 1
        text = next(lines[turn] for mark, lines in self.lines.items() if mark in prompt)
        text = text.replace("{last}", re.findall(r"\d+", prompt)[-1])
        ends = [text.find(stop) + len(stop) for stop in params.stop if stop in text]
        said = text[: min(ends)] if ends else text
        ids = [token for letter in said for token in self.tokenizer.encode(letter)]
        ids += [] if ends else [self.tokenizer.tokenizer.eos_token_id]
        logprobs = [-(self.drawn + i) / 2**14 for i in range(1, len(ids) + 1)]
        self.drawn += len(ids)
        self.sampled.append(Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop"))
        return self.sampled[-1]
