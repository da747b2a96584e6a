"""The package's outer ways to completions: the rollout processor and `agenerate`.

Invariant: as for `clients`. Prompts are rendered here by hand, so what was asked is known without
asking the package.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from eval_protocol_rft.sampling._fanout import derive_seeds
from tests.hostile.ask import Ask, listening
from tests.hostile.book import GROUP, Book
from tests.hostile.replies import END_OF_TURN

ROWS_AT_ONCE = 256
"""Rows of one call of the processor. It leaves what was sampled on them, so all of a long run's
would be memory that grows."""
JOBS = 4
"""Files that `generate` writes, half of them from streams. Each quarter of a run has one, and reads
it back, so memory can be compared between quarters."""


async def through_processor(ask: Ask, book: Book) -> None:
    """The rollout processor as Eval Protocol calls it, with rows of its own."""
    from eval_protocol_rft import FireworksTrainingRolloutProcessor
    from eval_protocol_rft.rollout._processor import RolloutError
    from tests.rollouts import config_of, record_of_row, row_of

    tokenizer = servers_tokenizer()
    processor = FireworksTrainingRolloutProcessor(tokenizer=tokenizer, retry=ask.retry)

    def tell(prompt: int, row: Any) -> None:
        if isinstance(row, RolloutError):
            for failure in row.failures:
                book.failed(prompt * GROUP + failure.index, failure.kind, tries=failure.attempts)
            return
        if isinstance(row, BaseException):
            raise row
        record = record_of_row(row)
        answers = [one.content for one in row.messages if one.role == "assistant"]
        if answers != record.completions_text[:1]:
            book.wrong(prompt * GROUP, f"the row's answers are {answers}")
        for place, index in enumerate(record.sampling.indices):
            book.accepted(
                prompt * GROUP + index,
                record.completion_ids[place],
                record.inference_logprobs[place],
                record.finish_reasons[place],
                prompt_ids=record.prompt_ids,
                tries=record.sampling.attempts[place],
                raw=record.raw_logprobs and record.raw_logprobs[place],
            )
        for failure in record.failures:
            book.failed(prompt * GROUP + failure.index, failure.kind, tries=failure.attempts)

    try:
        with listening(book, lambda prompt, index: int(prompt) * GROUP + index):
            for begin in ask.prompts[::ROWS_AT_ONCE]:
                prompts = ask.prompts[begin : begin + ROWS_AT_ONCE]
                for prompt in prompts:
                    seeds = derive_seeds(ask.seed, str(prompt), GROUP)
                    book.asks(prompt, _rendered(tokenizer, prompt), seeds)
                stream = begin // ROWS_AT_ONCE % 2 == 1
                rows = [row_of(_question(prompt), row_id=str(prompt)) for prompt in prompts]
                config = config_of(ask.params(stream=stream), slots=ask.in_flight)
                ended = await asyncio.gather(*processor(rows, config), return_exceptions=True)
                for prompt, row in zip(prompts, ended, strict=True):
                    tell(prompt, row)
    finally:
        await processor.acleanup()


async def through_generate(ask: Ask, book: Book) -> None:
    """`agenerate`, and what its files hold."""
    from eval_protocol_rft.data._dataset import RolloutDataset
    from eval_protocol_rft.data._generate import agenerate

    tokenizer = servers_tokenizer()
    size = -(-len(ask.prompts) // JOBS)
    with tempfile.TemporaryDirectory() as folder:
        for job in range(JOBS):
            prompts = ask.prompts[job * size : (job + 1) * size]
            for at, prompt in enumerate(prompts):
                seeds = derive_seeds(ask.seed, str(at), GROUP)
                book.asks(prompt, _rendered(tokenizer, prompt), seeds)
            data, output = Path(folder, f"data{job}.jsonl"), Path(folder, f"out{job}.parquet")
            _write(data, prompts)

            def number(row_id: str, index: int, first: int = job * size) -> int:
                return (first + int(row_id.rpartition("-")[2])) * GROUP + index

            with listening(book, number):
                await agenerate(
                    data,
                    output,
                    ask.params(stream=job % 2 == 1),
                    concurrency=ask.in_flight,
                    retry=ask.retry,
                    tokenizer=tokenizer,
                    progress=False,
                )
            for row in RolloutDataset(output).rows():
                _tell_row(book, number(row.row_id, row.sample_idx), row)


@cache
def servers_tokenizer() -> Any:
    """Reads the ids as the server does, which is compared; prompts are bytes above them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.rollouts import CHAT_TEMPLATE

    vocab = {f"<{token}>": token for token in range(END_OF_TURN)} | {"<|im_end|>": END_OF_TURN}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def _tell_row(book: Book, number: int, row: Any) -> None:
    if row.failed:
        book.failed(number, row.error_kind, tries=row.attempts)
        return
    book.accepted(
        number,
        row.completion_ids.tolist(),
        row.logprobs.tolist(),
        row.finish_reason,
        prompt_ids=row.prompt_ids.tolist(),
        tries=row.attempts,
        raw=None if row.raw_logprobs is None else row.raw_logprobs.tolist(),
        single=True,
    )


def _write(path: Path, prompts: Sequence[int]) -> None:
    path.write_text("".join(json.dumps({"prompt": _question(one)}) + "\n" for one in prompts))


def _question(prompt: int) -> str:
    return f"question {prompt}"


def _rendered(tokenizer: Any, prompt: int) -> list[int]:
    """The ids of a question under the tests' chat template, written out by hand."""
    text = f"<|im_start|>user\n{_question(prompt)}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer.encode(text)
    return ids
