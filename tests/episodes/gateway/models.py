"""A model for tests of the gateway: a byte a token, answers that a script gives, and logprobs that
say when each token was sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from eval_protocol_rft.sampling import Completion, SamplingParams
from tests.rollouts import chat_tokenizer
from tests.serving import EOS

CALL = '<tool_call>\n{"name": "add", "arguments": {"a":2,  "b": 40}}\n</tool_call>'


class Model:
    """Samples what `answer(prompt_text)` says, with the end of turn behind it, and keeps what went
    over the seam. `gate`, where it is set, holds every answer back."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.tokenizer = chat_tokenizer()
        self.answer = answer
        self.wire: list[tuple[list[int], Completion]] = []
        self.asked: list[SamplingParams] = []
        self.seeds: list[int | None] = []
        self.began = asyncio.Semaphore(0)
        self.gate: asyncio.Event | None = None
        self.failing: Exception | None = None
        self.context_length = 100_000

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        self.asked.append(params)
        self.seeds.append(seed)
        self.began.release()
        if self.gate is not None:
            await self.gate.wait()
        if self.failing is not None:
            raise self.failing
        ids = self.tokenizer.encode(self.answer(self.tokenizer.decode(prompt_ids)) + EOS)
        most = params.max_tokens or len(ids)
        number = len(self.wire) + 1
        completion = Completion(
            token_ids=ids[:most],
            logprobs=[-number / 64 - place / 4096 for place in range(len(ids[:most]))],
            finish_reason="stop" if most >= len(ids) else "length",
        )
        self.wire.append((list(prompt_ids), completion))
        return completion

    async def aclose(self) -> None:
        pass


def tool_model() -> Model:
    """Calls `add`, and says 42 once it has seen a tool's answer."""
    return Model(lambda prompt: "It is 42." if "<|im_start|>tool" in prompt else CALL)
