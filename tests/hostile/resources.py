"""What a run must leave as it found it: memory, descriptors, sockets, tasks, threads."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import statistics
import threading
from dataclasses import dataclass, field

import pyarrow

SAMPLE_SECONDS = 0.5
GROWTH_MIB, GROWTH_SHARE = 15.0, 0.05
"""Steady growth from the second quarter of a run to the last, the larger of the two: half of a
run of 20,000 completions that keeps a kilobyte of each shows as 10 MiB, so 15 is a kilobyte and a
half. What the book and the server keep of each is a tenth of that."""
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_set_option = getattr(ctypes.CDLL(None), "mallopt", None)
"""Both of glibc."""
_ARENA_MAX = -8
"""`M_ARENA_MAX` of malloc.h."""
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def one_arena() -> None:
    """Have all threads that begin from now on share one heap. Each with its own leaves half-empty
    pages behind, some kilobytes for a completion, while what is alive stays the same: in those a
    leak would not show."""
    if _set_option is not None:
        _set_option(_ARENA_MAX, 1)
        # Arrow's own allocator keeps segments for every thread that wrote a file once: 45 MiB at
        # some moment of a run through `generate`, and no more however long it is.
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())


def held_mib() -> float:
    """Memory of this process's own that is in RAM, in MiB, after garbage is collected and free
    pages are given back: a reply of 128 MiB that was refused leaves arenas of free memory behind,
    by chance some 50 MiB more or less, in which a leak would not show. Pages of files (libraries,
    what is mapped to be read) do not count: they come when code is first used and go when others
    need the room."""
    gc.collect()
    if _trim is not None:
        _trim(0)
    pyarrow.default_memory_pool().release_unused()
    with open("/proc/self/statm") as file:
        _, resident, of_files, *_ = file.read().split()
    return (int(resident) - int(of_files)) * _PAGE_MIB


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds."""

    descriptors: int
    sockets: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                continue  # the one that listed them
        sockets = sum(link.startswith("socket:") for link in links)
        return cls(len(links), sockets, threading.active_count())

    def more_than(self, before: Held) -> list[str]:
        """What there is more of than before."""
        names = ("descriptors", "sockets", "threads")
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in names]
        return [f"{name}: {was} before, {now} after" for name, was, now in pairs if now > was]


@dataclass(slots=True)
class Memory:
    """Memory over a run, sampled at even distances."""

    mib: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        """Sample until cancelled."""
        gc.freeze()  # what was imported needs no look each time
        try:
            while True:
                self.mib.append(held_mib())
                await asyncio.sleep(SAMPLE_SECONDS)
        finally:
            gc.unfreeze()

    def quarters(self) -> list[float]:
        """The median of each quarter; a shorter run has none."""
        size = len(self.mib) // 4
        parts = [self.mib[i * size : (i + 1) * size] for i in range(4)]
        return [statistics.median(part) for part in parts] if size else []

    def growth(self) -> str | None:
        """What is wrong with it. The first quarter is for warming up. What leaks grows from the
        second to the third and again to the last, so the smaller step counts, twice; a heap may
        find its size as late as in the third (Python's, after bursts of small objects), and then
        grows no more."""
        quarters = self.quarters()
        if not quarters:
            return None
        _, second, third, last = quarters
        most = max(GROWTH_MIB, GROWTH_SHARE * second)
        if max(2 * min(third - second, last - third), last - third) <= most:
            return None
        return f"memory grew from {second:.1f} to {last:.1f} MiB, by more than {most:.1f}"
