"""Code of others that forks and comes back.

Invariant: only the process that made a call goes on behind it. The copy would write the same files,
send the same requests and answer the same calls once more.
"""

from __future__ import annotations

import os


def end_copy_of(process: int) -> None:
    """End this process at once, without a word or an exit handler, unless it is `process`."""
    if os.getpid() != process:
        os._exit(0)
