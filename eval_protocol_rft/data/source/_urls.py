"""URLs of `fsspec`: what they are called, and how what is behind them is reached.

Invariant: what a URL keeps secret (a password, a signed query) is in no message, and what libraries
raise is one line of ours.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import proxy_for

PathOrGlob = str | os.PathLike[str]

URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)(::|:/)")
"""`s3://bucket/x`, `zip://x::s3://bucket/y`; and what `Path` makes of them, `s3:/bucket/x`."""
HTTP = ("http://", "https://")
_HERE = ("file", "local")
_QUIET_SECONDS = 60
"""A server that sends nothing for so long is away."""


class SourceError(EvalProtocolRftError, ValueError):
    """Data that cannot be read as they are. The message says what, where and what to do."""


def is_url(name: PathOrGlob) -> bool:
    """Whether a name is the URL of a file, and no file here is called so."""
    text = os.fspath(name)
    found = URL.match(text)
    return found is not None and found[1] not in _HERE and not os.path.lexists(text)


def shown(name: PathOrGlob) -> str:
    """A path or URL as messages may show it: without user, password, query and fragment."""
    text = os.fspath(name)
    return "::".join(map(_without_secrets, text.split("::"))) if is_url(text) else text


def _without_secrets(url: str) -> str:
    if not url.startswith(("abfs://", "abfss://")):  # container@account
        url = re.sub(r"://[^/]*@", "://***@", url)
    # Elsewhere a question mark may stand in a name or a pattern.
    asks = r"[?#].*" if url.lower().startswith(HTTP) else r"\?.*=.*"
    return re.sub(asks, "?***", url, flags=re.DOTALL)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and what it calls the file."""
    import aiohttp
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    for part in url.split("::"):
        protocol = part.partition("://")[0]
        if protocol in ("http", "https"):
            wait = aiohttp.ClientTimeout(
                total=None, sock_connect=_QUIET_SECONDS, sock_read=_QUIET_SECONDS
            )
            # What is encoded stays as it is: it may be signed.
            web = {"client_kwargs": {"timeout": wait}, "encoded": "%" in part}
            if proxy := proxy_for(part):
                web["proxy"] = proxy
            options |= {protocol: web} if "::" in url else web
    fs, name = url_to_fs(url, **options)
    return fs, name


@contextlib.contextmanager
def in_one_line(where: str) -> Iterator[None]:
    """What libraries raise as `SourceError`. Their texts may hold what `where` hides."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - the new one may not lead to its text
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise SourceError(no_room(f"{where}: it is copied", error)) from None
        raise SourceError(f"{where}: {_reason(error, may_quote='***' not in where)}") from None


def _reason(error: Exception, *, may_quote: bool) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, ImportError):
        return str(error)  # which package to install
    text = str(error).partition("\n")[0][:300] if may_quote else getattr(error, "strerror", None)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def get_file(fs: Any, name: str, target: str) -> None:
    """Copy a file; Ctrl-C and the end of the process end the copying too."""
    if not fs.async_impl:
        fs.get_file(name, target)
        return
    # In an event loop of fsspec's, which nobody stops.
    copy = asyncio.run_coroutine_threadsafe(fs._get_file(name, target), fs.loop)
    stop = functools.partial(_stop, copy, fs.loop)
    atexit.register(stop)
    try:
        copy.result()
    except BaseException:
        stop()
        raise
    finally:
        atexit.unregister(stop)


def _stop(copy: Future[None], loop: asyncio.AbstractEventLoop) -> None:
    if copy.cancel():
        with contextlib.suppress(TimeoutError):  # time to let go of the connection
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=1)


_OF_A_STATE = re.compile(
    r"size|e_?tag|.*modified|mtime|updated|created|generation|version.*|blob_id|crc32c|md5.*|sha.*"
)


def remote_state(fs: Any, name: str) -> dict[str, str]:
    """By what a remote file is known to be the same."""
    fs.invalidate_cache()
    info = fs.info(name)
    return {key: str(info[key]) for key in info if _OF_A_STATE.fullmatch(key.lower())}


def no_room(what: str, error: OSError) -> str:
    return (
        f"{what} into {tempfile.gettempdir()}, and that cannot be written: {error.strerror}. Set "
        "TMPDIR to a folder with more room"
    )
