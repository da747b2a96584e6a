"""A scripted model that calls one of two tools at random, and answers with what it says."""

import json
import math
import random
import re
from collections.abc import Sequence

from eval_protocol_rft.local import load_tokenizer
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.sampling import Completion, SamplingParams

TOOLS = ("add", "multiply")


class Guesser:
    """Its logprobs are exact: a token is a byte, and all that it draws is the tool's first."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(str(bundled_model_path("arithmetic")))

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        said = self.tokenizer.decode(list(prompt_ids)).rpartition("<|im_start|>user")[2]
        if results := re.findall(r'"result": (\d+)', said):
            text, at = results[-1], None
        else:
            a, b = re.findall(r"\d+", said)[:2]
            tool = random.Random(seed).choice(TOOLS)
            call = json.dumps({"name": tool, "arguments": {"a": int(a), "b": int(b)}})
            text = f"<tool_call>\n{call}\n</tool_call>"
            at = text.index(tool)
        ids = self.tokenizer.encode(f"{text}<|im_end|>")
        logprobs = [0.0] * len(ids)
        if at is not None:
            logprobs[at] = math.log(1 / len(TOOLS))
        return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop")

    async def aclose(self) -> None:
        """Nothing is open."""
