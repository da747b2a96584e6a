"""An append-only file of Arrow batches: where finished completions go first.

Invariant: what `append` returned for is on disk. A frame that a crash cut off, or filled with
something else, ends the journal: reading stops before it, and it is cut away before the next
append.

A frame is the magic `EPRJ`, the length of the payload and its CRC-32 (both little-endian uint32),
and the payload: one Arrow IPC record batch message, without its schema.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pyarrow as pa

from eval_protocol_rft.durable import DurableFile

_HEADER = struct.Struct("<4sII")
_MAGIC = b"EPRJ"


class Journal:
    """One journal file, open for appending after what it held."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.batches: list[pa.RecordBatch] = []
        """What the file holds, in order of appending."""
        keep = 0
        if path.exists():
            self.batches, keep = read_journal(path.read_bytes(), schema)
        self._file = DurableFile(path, keep=keep)

    def append(self, batch: pa.RecordBatch) -> None:
        """Add a batch, and wait until it is on disk.

        Raises:
            OSError: the disk is full or failed; the journal is as it was.
        """
        payload = batch.serialize()
        end = self._file.tell()
        self._file.write(_HEADER.pack(_MAGIC, payload.size, zlib.crc32(payload)) + bytes(payload))
        try:
            self._file.sync()
        except OSError:
            self._file.cut(end)
            raise
        self.batches.append(batch)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file: its rows are elsewhere now."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def read_journal(data: bytes, schema: pa.Schema) -> tuple[list[pa.RecordBatch], int]:
    """The whole frames at the start of `data`, and how many bytes they take."""
    batches: list[pa.RecordBatch] = []
    start = 0
    while len(data) - start >= _HEADER.size:
        magic, size, checksum = _HEADER.unpack_from(data, start)
        payload = data[start + _HEADER.size : start + _HEADER.size + size]
        # An empty payload would match a header whose rest is zeros, which a power cut can leave.
        if magic != _MAGIC or not payload or len(payload) != size:
            break
        if zlib.crc32(payload) != checksum:
            break
        batches.append(pa.ipc.read_record_batch(pa.py_buffer(payload), schema))
        start += _HEADER.size + size
    return batches, start
