"""What a turn of an episode costs beside a completion of a single turn, and how that grows.

    python benchmarks/episodes.py [--turns 8 32] [--rows 32] [--n 8] [--tokens 128] [--threads]

Episodes beside single completions of prompts of the same lengths: one of each prompt, which makes
the requests that episodes make, and n of each, which share what is done once for a prompt. All go
to the same instant server (a process of its own), rows x n episodes at once. CPU is that of this
process; the peers rotate, and a ratio is the median of those within a repeat. A peer that ends with
fewer sampled tokens than were served ends the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import stub
from peer_kit import MODEL, config_of
from rich.console import Console
from rich.table import Table

from eval_protocol_rft.local.models import bundled_model_path

SAID = "Not yet. Look again at what you were told, and say which way to go next."
"""What the environment says after each turn: about as many tokens as an observation has."""


EPISODES = "episodes"
SINGLE = "n a prompt"
SINGLE_OF_ONE = "1 a prompt"


class Run(NamedTuple):
    """What one run of a peer took."""

    cpu: float
    wall: float
    rows: list[Any]


class Replies:
    """One reply that ends its turn, with the request's prompt in it."""

    def __init__(self, ids: list[int]) -> None:
        logprobs = [-(1 + i % 97) / 64 for i in range(len(ids))]
        entries = [
            {"token": "?", "token_id": token, "logprob": lp, "sampling_logprob": lp, "bytes": [63]}
            for token, lp in zip(ids, logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "text": "?",
            "finish_reason": "stop",
            "logprobs": {"content": entries},
            "prompt_token_ids": "@prompt@",
            "token_ids": ids,
        }
        body = msgspec.json.encode({"id": "cmpl-stub", "model": MODEL, "choices": [choice]})
        self._parts = body.split(b'"@prompt@"')
        self._decode = msgspec.json.Decoder(stub.Request).decode

    def answer(self, body: bytes) -> bytes:
        reply = bytes(self._decode(body).prompt).join(self._parts)
        return stub.HEAD % len(reply) + reply


async def serve(ids: list[int]) -> None:
    """Answer until standard input is closed."""
    replies: Any = Replies(ids)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: stub.Connection(replies), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


@contextmanager
def server(ids: list[int]) -> Iterator[str]:
    """Its base URL."""
    command = [sys.executable, __file__, "--serve", ",".join(map(str, ids))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


class Bench:
    """Both peers over one server."""

    def __init__(self, options: argparse.Namespace, tokenizer: Any, url: str, turns: int) -> None:
        from eval_protocol_rft import EpisodeRolloutProcessor, FireworksTrainingRolloutProcessor
        from eval_protocol_rft.episodes._environment import EpisodeLimits

        self.turns, self.options, self.tokenizer = turns, options, tokenizer
        self.episodes = EpisodeRolloutProcessor(
            make_environment(options.threads),
            tokenizer=tokenizer,
            limits=EpisodeLimits(turns=turns, tokens=1_000_000),
        )
        self.single = FireworksTrainingRolloutProcessor(tokenizer=tokenizer)
        self.url = url

    def rows_of_turns(self, lengths: Sequence[int], count: int) -> list[Any]:
        """Single turns whose prompts are as long as those of the episodes' turns."""
        bodies = [filled(self.tokenizer, length) for length in lengths]
        return [
            row_of(f"s{i}-{turn}", f"{i:05d}{body}")
            for i in range(count)
            for turn, body in enumerate(bodies)
        ]

    async def run(self, peer: str, lengths: Sequence[int], rows: int) -> Run:
        """`peer` does the work of `rows` rows."""
        n = 1 if peer == SINGLE_OF_ONE else self.options.n
        if peer == EPISODES:
            processor: Any = self.episodes
            given = [row_of(f"e{i}", f"Where to, in world {i}?") for i in range(rows)]
        else:
            processor = self.single
            given = self.rows_of_turns(lengths, rows * self.options.n // n)
        fields = {"model": MODEL, "api_base": self.url, "api_key": "none", "seed": 0}
        config = config_of(
            self.options.concurrency, {**fields, "n": n, "max_tokens": self.options.tokens}
        )
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        done = list(await asyncio.gather(*processor(given, config)))
        run = Run(time.process_time() - cpu, time.perf_counter() - wall, done)
        check(done, rows * self.options.n * self.turns * self.options.tokens)
        return run


def make_environment(threads: bool) -> Callable[[], Any]:
    from eval_protocol_rft.episodes._environment import Environment, Step

    def step() -> Step:
        return Step(messages=[{"role": "user", "content": SAID}], reward=0.0)

    class Async(Environment):
        async def step(self, messages: Any, assistant: Any) -> Step:
            return step()

    class Threaded(Environment):
        def step(self, messages: Any, assistant: Any) -> Step:
            return step()

    return Threaded if threads else Async


def row_of(row_id: str, text: str) -> Any:
    from eval_protocol.models import EvaluationRow, InputMetadata, Message

    return EvaluationRow(
        messages=[Message(role="user", content=text)], input_metadata=InputMetadata(row_id=row_id)
    )


def filled(tokenizer: Any, length: int) -> str:
    """Text that makes a prompt of about `length` tokens behind a number of five digits."""
    text = " go" * length
    render = tokenizer.apply_chat_template
    while True:
        said = [{"role": "user", "content": "00000" + text}]
        excess = len(render(said, tokenize=True, return_dict=False)) - length
        if excess <= 0 or not text:
            return text
        text = text[: -max(3, excess)]


async def measure(options: argparse.Namespace, tokenizer: Any, url: str, turns: int) -> list[str]:
    """One line of the table."""
    bench = Bench(options, tokenizer, url, turns)
    warm = await bench.run(EPISODES, (), 2)
    traces = warm.rows[0].execution_metadata.extra["token_turn_traces"]
    lengths = [len(trace["prompt_ids"]) for trace in traces]
    assert len(lengths) == turns
    runs: dict[str, list[Run]] = {EPISODES: [], SINGLE: [], SINGLE_OF_ONE: []}
    peers = list(runs)
    for peer in peers:
        await bench.run(peer, lengths, 2)
    for repeat in range(options.repeats):
        for peer in [*peers[repeat % 3 :], *peers[: repeat % 3]]:
            run = await bench.run(peer, lengths, options.rows)
            runs[peer].append(run._replace(rows=[]))
    await bench.episodes.acleanup()
    await bench.single.acleanup()
    count = options.rows * options.n * turns
    cpu = {peer: statistics.median(run.cpu for run in own) for peer, own in runs.items()}
    wall = statistics.median(run.wall for run in runs[EPISODES])
    return [
        str(turns),
        f"{statistics.mean(lengths):.0f}",
        *(f"{1e3 * cpu[peer] / count:.2f}" for peer in peers),
        *(
            f"{statistics.median(ratios(runs[EPISODES], runs[peer])):.2f}"
            for peer in (SINGLE, SINGLE_OF_ONE)
        ),
        f"{count / wall:.0f}",
    ]


def ratios(ours: list[Run], theirs: list[Run]) -> list[float]:
    """Of CPU, within each repeat."""
    return [our.cpu / their.cpu for our, their in zip(ours, theirs, strict=True)]


def check(rows: list[Any], served: int) -> None:
    """All that was served is there."""
    from eval_protocol_rft.record import RolloutRecord

    sampled = 0
    for row in rows:
        record = RolloutRecord.from_extra(row.execution_metadata.extra)
        if record.trajectories is None:
            sampled += sum(map(len, record.completion_ids))
        else:
            sampled += sum(sum(s.loss_mask) for segments in record.trajectories for s in segments)
    if sampled != served:
        raise RuntimeError(f"{sampled} tokens on the rows, {served} were served")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--n", type=int, default=8, help="episodes per row")
    parser.add_argument("--tokens", type=int, default=128, help="sampled per turn")
    parser.add_argument("--concurrency", type=int, default=256, help="requests in flight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", default=str(bundled_model_path("arithmetic")))
    parser.add_argument(
        "--threads", action="store_true", help="a step that is not async, and so runs in a thread"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve([int(token) for token in options.serve.split(",")]))
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    word = tokenizer(" 7", add_special_tokens=False)["input_ids"]
    ids = [*(word * options.tokens)[: options.tokens - 1], tokenizer.eos_token_id]
    names = ["turns", "mean prompt", EPISODES, SINGLE, SINGLE_OF_ONE]
    names += [f"x {SINGLE}", f"x {SINGLE_OF_ONE}", "turns/s"]
    size = f"{options.rows * options.n} episodes, {options.tokens} tokens a turn"
    table = Table(*names, title=f"{size}, ms of CPU per turn")
    with server(ids) as url:
        for turns in options.turns:
            table.add_row(*asyncio.run(measure(options, tokenizer, url, turns)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
