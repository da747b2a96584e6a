"""A scripted model that calls `move` in a random direction."""

import json
import math
import random
from collections.abc import Sequence

from eval_protocol_rft.local import load_tokenizer
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.sampling import Completion, SamplingParams

DIRECTIONS = ("left", "down", "right", "up")


class Wanderer:
    """Its logprobs are exact: a token is a byte, and all that it draws is the direction's first."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(str(bundled_model_path("arithmetic")))

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        direction = random.Random(seed).choice(DIRECTIONS)
        call = json.dumps({"name": "move", "arguments": {"direction": direction}})
        text = f"<tool_call>\n{call}\n</tool_call><|im_end|>"
        ids = self.tokenizer.encode(text)
        logprobs = [0.0] * len(ids)
        logprobs[text.index(f'"{direction}"') + 1] = math.log(1 / len(DIRECTIONS))
        return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop")

    async def aclose(self) -> None:
        """Nothing is open."""
