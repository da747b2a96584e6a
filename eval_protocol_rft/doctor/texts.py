"""What the probes say, and the texts that a tokenizer has to bring back."""

from __future__ import annotations

from typing import Any

PROMPTS = (
    "51+29=",
    "64+78=",
    "Name an animal, any animal. Answer with one word.",
    "Pick a number between 1 and 100. Answer with the number only.",
)
"""Questions with short answers of which several are likely: where the first token is certain, no
test of probabilities can see anything."""

PLAIN_TEXTS = (
    "What is 17 + 25?",
    "The quick brown fox jumps over the lazy dog.",
    "if x == 0:\n    return {'a': [1, 2.5]}\n",
    "Two  spaces, a\ttab, and two\n\nlines.",
)
"""ASCII: a tokenizer that changes it shows the model another prompt than the data set holds."""

FURTHER_TEXTS = (
    "Où est la bibliothèque ? Straße, ñandú.",
    "二加二等于四。",
    "∀x ∈ ℝ: x² ≥ 0",
    "🙂👩‍👩‍👧 done",
)

THOUGHT = "<think>\nTen and ten is twenty.\n</think>\n\n"


def conversation(answer: str = "Twenty.") -> list[dict[str, Any]]:
    """Three turns; `answer` is the first one's."""
    return [
        {"role": "user", "content": "What is 10 plus 10?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And 20 plus 2?"},
        {"role": "assistant", "content": "Twenty-two."},
        {"role": "user", "content": "And 3 more?"},
    ]
