"""One peer of the client benchmark in a process of its own, at each number of requests in flight.

    python benchmarks/client_peers.py PEER JOB

Every peer gets the same rows and returns token ids and sampling logprobs of n completions for each.
A peer's libraries are imported, its client is made and `WARM_UP_ROWS` rows went through it before
the clock starts; what it imports is its own affair, so a peer without Eval Protocol pays nothing
for it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import peers_others
import peers_ours
from peer_kit import Peer
from workload import WARM_UP_ROWS, Measurement, Meter, Workload

PEERS: dict[str, Peer] = {
    "bare": peers_ours.bare,
    "sampler": peers_ours.sampler,
    "bare_streamed": peers_ours.bare_streamed,
    "streamed": peers_ours.streamed,
    "bare_streamed_32": peers_ours.bare_streamed_32,
    "streamed_32": peers_ours.streamed_32,
    "processor": peers_ours.processor,
    "deployment_sampler": peers_others.deployment_sampler,
    "openai": peers_others.openai,
    "ep_client": peers_others.ep_client,
    "litellm": peers_others.litellm,
}


class Level(msgspec.Struct, frozen=True):
    """One point of the curve."""

    in_flight: int
    rows: int


class Job(msgspec.Struct, frozen=True):
    """What the peer's process is to do."""

    workload: str
    url: str
    """Up to and including `/v1`."""
    levels: list[Level]
    result: str


async def measure(peer: Peer, workload: Workload, url: str, level: Level) -> Measurement:
    """Warm up, then time `level.rows` rows."""
    workload = msgspec.structs.replace(workload, concurrency=level.in_flight)
    meter = Meter()
    async with peer(workload, url) as fetch:
        await fetch(range(WARM_UP_ROWS))
        with meter.running():
            pairs = await fetch(range(WARM_UP_ROWS, WARM_UP_ROWS + level.rows))
    return meter.measurement(pairs)


def main() -> None:
    job = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=Job)
    workload = Workload.load(job.workload)
    peer = PEERS[sys.argv[1]]
    measured = [asyncio.run(measure(peer, workload, job.url, level)) for level in job.levels]
    Path(job.result).write_bytes(msgspec.json.encode(measured))


if __name__ == "__main__":
    main()
