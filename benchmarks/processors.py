"""The two peers of our processor: one on Eval Protocol's own client, one with canned data."""

from __future__ import annotations

import asyncio
from typing import Any

from eval_protocol.integrations.fireworks_v1_completions_client import FireworksV1CompletionsClient
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig
from openai.types import CompletionUsage
from workload import CannedReply, Workload


class ClientProcessor(RolloutProcessor):
    """n calls of `FireworksV1CompletionsClient` per row, as one would write it.

    Two favours: the prompt is rendered once per row, and the client gets a tokenizer that is loaded
    already, where each new client would load its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._client: FireworksV1CompletionsClient | None = None

    def __call__(
        self, rows: list[EvaluationRow], config: RolloutProcessorConfig
    ) -> list[asyncio.Task[EvaluationRow]]:
        params = config.completion_params
        if self._client is None:
            self._client = FireworksV1CompletionsClient(
                model_id=params["model"],
                tokenizer_name_or_path=params["tokenizer"],
                base_url=params["api_base"],
                api_key=params["api_key"],
                temperature=params["temperature"],
                max_tokens=params["max_tokens"],
                request_params={"top_p": 1.0, "top_k": 0},
            )
            self._client._tokenizer = self._tokenizer
        return [
            asyncio.create_task(_roll_out(row, config, self._client, params["n"])) for row in rows
        ]

    async def acleanup(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


async def _roll_out(
    row: EvaluationRow, config: RolloutProcessorConfig, client: FireworksV1CompletionsClient, n: int
) -> EvaluationRow:
    messages = [message.dump_mdoel_for_chat_completion_request() for message in row.messages]
    prompt_ids = client.build_prompt_token_ids(messages=messages, tools=row.tools)

    async def complete() -> dict[str, Any]:
        async with config.semaphore:
            return await client.create_completion_from_prompt_ids(prompt_token_ids=prompt_ids)

    results = await asyncio.gather(*(complete() for _ in range(n)))
    texts = [result["choices"][0]["message"]["content"] for result in results]
    _put(
        row,
        texts,
        {
            "prompt_ids": prompt_ids,
            "completion_ids": [result["completion_ids"] for result in results],
            "inference_logprobs": [result["completion_logprobs"] for result in results],
            "finish_reasons": [result["finish_reason"] for result in results],
        },
    )
    return row


class CannedProcessor(RolloutProcessor):
    """Returns at once with data of the size that our processor leaves on a row."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rows = 0

    def __call__(
        self, rows: list[EvaluationRow], config: RolloutProcessorConfig
    ) -> list[asyncio.Task[EvaluationRow]]:
        return [asyncio.create_task(self._fill(row)) for row in rows]

    async def _fill(self, row: EvaluationRow) -> EvaluationRow:
        replies, n = self._workload.replies, self._workload.n
        chosen: list[CannedReply] = [replies[(self._rows + j) % len(replies)] for j in range(n)]
        self._rows += 1
        first = chosen[0]
        prompt_ids = list(self._workload.prompt_ids[0])
        _put(
            row,
            ["".join(reply.tokens) for reply in chosen],
            {
                "prompt_ids": prompt_ids,
                "completion_ids": [list(reply.token_ids) for reply in chosen],
                "inference_logprobs": [list(reply.sampling_logprobs) for reply in chosen],
                "raw_logprobs": [list(reply.logprobs) for reply in chosen],
                "finish_reasons": ["length"] * n,
                "token_turn_traces": [
                    {
                        "prompt_ids": list(prompt_ids),
                        "completion_ids": list(first.token_ids),
                        "completion_logprobs": list(first.sampling_logprobs),
                        "finish_reason": "length",
                    }
                ],
            },
        )
        return row


def _put(row: EvaluationRow, texts: list[str], extra: dict[str, Any]) -> None:
    prompt_tokens = len(extra["prompt_ids"]) * len(texts)
    completion_tokens = sum(map(len, extra["completion_ids"]))
    row.messages = [*row.messages, Message(role="assistant", content=texts[0])]
    row.execution_metadata.extra = {
        **(row.execution_metadata.extra or {}),
        **extra,
        "completions_text": texts,
        "truncated": [reason == "length" for reason in extra["finish_reasons"]],
    }
    row.execution_metadata.usage = CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
