"""`HostileServer`: completions on loopback, with faults, and a ledger of what really happened.

    with HostileServer(plan=FaultPlan(seed=1)) as server:
        ...  # POST f"{server.url}/v1/completions"
        server.die(); server.rise()

It runs on raw asyncio streams in a thread of its own. Every connection and every request is in the
ledger, in the order of arrival; for long runs each entry is handed over instead, once it is final.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from tests.hostile import (  # noqa: F401 - each fills the register
    faults_contents,
    faults_framing,
    faults_harmless,
    faults_numbers,
    faults_statuses,
    faults_streams,
    faults_transport,
)
from tests.hostile.exchange import ClientGoneError, Exchange, Request
from tests.hostile.faults import Fault
from tests.hostile.http1 import LONGEST_HEAD, NoRequestError, read_request
from tests.hostile.ledger import Death, Entry, Plan, dialect_of
from tests.hostile.replies import Dialect, Truth, truth_of
from tests.waiting import wait_until

FIRST_OWN_SEED = 2**32
"""Its own seeds are above those that a request may carry."""
T = TypeVar("T")


class HostileServer:
    """Serves until the `with` block ends. Its methods may be called from any other thread."""

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        dialect: Dialect | Literal["both"] = "fireworks",
        deaths: tuple[Death, ...] = (),
        on_final: Callable[[Entry], None] | None = None,
    ) -> None:
        """
        Args:
            plan: which faults strike; None: none does.
            dialect: `both`: every prompt has one of them, all its completions the same.
            deaths: when it dies in mid run.
            on_final: called, in the server's thread, with each entry that nothing will change any
                more. The ledger then stays empty, so that a long run needs no memory for it.
        """
        self.plan = plan
        self.dialect: Dialect | Literal["both"] = dialect
        self.ledger: list[Entry] = []
        self.connections_made = 0
        self._deaths = {death.after_requests: death.seconds for death in deaths}
        self._requests_read = 0
        self._on_final = on_final
        self._attempts: Counter[int] = Counter()
        """By the hash of (prompt, seed): with the prompts a long run would need memory for them."""
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        """Open connections by number."""
        self._latest: dict[int, Entry] = {}
        """The last entry of each open connection."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        """Base URL without a path."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def open_connections(self) -> int:
        return len(self._tasks)

    def faults(self) -> list[str]:
        return [entry.fault for entry in self.ledger]

    def truth(self, request: Request) -> Truth:
        """What it truly samples for a request."""
        return truth_of(request.prompt, request.seed, request.body.get("max_tokens"))

    def begin(self, plan: Plan | None) -> None:
        """Start afresh with another plan and an empty ledger; for when nobody asks anything."""
        self.plan = plan
        self.ledger = []
        self._attempts.clear()

    def die(self) -> None:
        """Reset every connection and refuse new ones."""
        self._do(self._die())

    def rise(self) -> None:
        """Listen again, on the same port."""
        self._do(self._rise())

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Block until it is so; the server learns late of what its clients did."""
        wait_until(true, lambda: self.ledger[-5:])

    def __enter__(self) -> HostileServer:
        self._thread.start()
        self.rise()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _rise(self) -> None:
        self._listener = await asyncio.start_server(
            self._accept,
            "127.0.0.1",
            self._port,
            limit=LONGEST_HEAD,
            backlog=1024,
            reuse_address=True,
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _die(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        tasks = self._tasks - {asyncio.current_task()}
        for number, writer in self._writers.items():
            if number in self._latest:
                self._latest[number].cut = True
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _die_for(self, seconds: float) -> None:
        await self._die()
        await asyncio.sleep(seconds)
        await self._rise()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        number, self.connections_made = self.connections_made, self.connections_made + 1
        self._tasks.add(task)
        self._writers[number] = writer
        # Small pieces must leave as they are written, or a drip is none.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._serve(number, reader, writer)
        except asyncio.CancelledError:
            pass  # by `die`, which waits for us
        finally:
            del self._writers[number]
            self._final(self._latest.pop(number, None))
            self._tasks.discard(task)
            writer.close()

    async def _serve(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fault = self.plan.of_connection(number) if self.plan else None
        if fault is not None:
            await self._answer(Entry(number, fault.name), fault, reader, writer)
            return
        keep_open = True
        while keep_open:
            try:
                _path, headers, body = await read_request(reader)
            except NoRequestError:
                return
            request = self._request(number, headers, body)
            dialect = self._dialect_of(request)
            fault = self.plan.of_request(request, dialect) if self.plan else None
            entry = Entry(number, fault.name if fault else "", request)
            keep_open = await self._answer(entry, fault, reader, writer)

    def _request(self, connection: int, headers: Any, body: Any) -> Request:
        prompt = tuple(body["prompt"])
        self._requests_read += 1
        seed = body.get("seed", FIRST_OWN_SEED + self._requests_read)
        asked = hash((prompt, seed))
        self._attempts[asked] += 1
        seconds = self._deaths.pop(self._requests_read, None)
        if seconds is not None:
            dying = asyncio.ensure_future(self._die_for(seconds))
            dying.add_done_callback(lambda ended: ended.result())
        return Request(
            connection=connection,
            body=body,
            headers=headers,
            prompt=prompt,
            seed=seed,
            attempt=self._attempts[asked],
        )

    def _dialect_of(self, request: Request | None) -> Dialect:
        if self.dialect != "both":
            return self.dialect
        return dialect_of(request.prompt if request else ())

    def _final(self, entry: Entry | None) -> None:
        if entry is not None and self._on_final is not None:
            self._on_final(entry)

    async def _answer(
        self,
        entry: Entry,
        fault: Fault | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        before = self._latest.get(entry.connection)
        entry.crossed = before is not None and (before.surplus or before.crossed)
        self._final(before)
        if self._on_final is None:
            self.ledger.append(entry)
        self._latest[entry.connection] = entry
        request = entry.request
        exchange = Exchange(
            reader,
            writer,
            request=request,
            dialect=self._dialect_of(request),
            rng=random.Random(f"{entry.fault}/{request and (request.seed, request.attempt)}"),
        )
        try:
            await (fault.act(exchange) if fault else exchange.honest())
        except ClientGoneError:
            return False
        finally:
            entry.whole, entry.sent, entry.done = exchange.whole, exchange.sent, True
            entry.surplus, entry.written_at = exchange.surplus, exchange.written_at
        return exchange.keep_open
