"""A chat server and a completions server that say the same, on loopback."""

from __future__ import annotations

import json
import re
from typing import Any

from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.parity.families import FAMILIES, Case, Family


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """One token per byte, the family's control tokens, and its template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.ender)
    tokenizer.chat_template = family.template
    return tokenizer


def asked(name: str, scenario: str) -> str:
    """The user's message, by which the servers know what to say."""
    return f"case <{name}/{scenario}>"


def case_of(text: str) -> tuple[str, Case]:
    name, scenario = re.findall(r"case <([^/>]+)/([^>]+)>", text)[-1]
    return name, FAMILIES[name].cases[scenario]


class Servers:
    """`/v1/chat/completions` says what is served of a case, `/v1/completions` the ids that were
    sampled."""

    def __init__(self, tokenizers: dict[str, Any]) -> None:
        self._tokenizers = tokenizers

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        return app

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        served = case_of(json.dumps(body["messages"]))[1].served
        calls = [
            {
                "id": f"chatcmpl-tool-{i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(served.calls)
        ]
        # As vLLM does: fields that are empty are there.
        message = {
            "role": "assistant",
            "content": served.content,
            "reasoning_content": served.reasoning,
            "tool_calls": calls,
        }
        choice = {"index": 0, "message": message, "finish_reason": served.finish_reason}
        return web.json_response(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
        )

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokenizer = self._tokenizers[body["model"]]
        name, case = case_of(tokenizer.decode(body["prompt"]))
        ids = list(tokenizer(case.text, add_special_tokens=False)["input_ids"])
        if case.finish_reason == "stop":
            ender = case.ender or FAMILIES[name].ender
            ids.append(tokenizer.convert_tokens_to_ids(ender))
        logprobs = {
            "tokens": [f"token_id:{token}" for token in ids],
            "token_logprobs": [-0.5] * len(ids),
            "top_logprobs": None,
            "text_offset": [0] * len(ids),
        }
        choice = {
            "index": 0,
            "text": case.text,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": logprobs,
            "finish_reason": case.finish_reason,
            "stop_reason": None,
        }
        return web.json_response(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
                "usage": {
                    "prompt_tokens": len(body["prompt"]),
                    "completion_tokens": len(ids),
                    "total_tokens": len(body["prompt"]) + len(ids),
                },
            }
        )
