"""Where data lies: paths, patterns, folders and URLs; compressed or not.

Invariant: what is read of a file is one state of it, whole. A file behind a URL is copied before
its first row is read, one that lies here is watched.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import well_formed
from eval_protocol_rft.data.source import _urls as urls
from eval_protocol_rft.data.source._urls import PathOrGlob, SourceError

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSED = (".gz", ".zst", ".bz2")
"""Endings of names. Whether a file is compressed, its first bytes say: a server may have undone it
on the way."""
_CODECS = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
    rb"|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
)
"""Arrow's name of how a file is compressed, by how the file begins."""
_PIECE_BYTES = 1 << 20


def _path_of(given: PathOrGlob) -> str:
    text = os.fspath(given)
    if not text:
        raise SourceError("no file is named: the name is empty")
    text = re.sub(r"^(file|local)://(localhost(?=/))?", "", text)
    return text if os.path.lexists(text) else os.path.expanduser(text)


def plain_name(path: PurePath) -> PurePath:
    """The name without the ending that says how the file is compressed."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


class Place:
    """A file or folder, here or behind a URL.

    Args:
        name: its path, or what its file system calls it.
        fs: fsspec's file system; None for this machine's.
        shown: how messages call it; default, by its path.
    """

    def __init__(self, name: str, fs: Any = None, shown: str | None = None) -> None:
        self.name = name
        self.shown = name if shown is None else shown
        self._fs = fs
        self._is_http = fs is not None and name.startswith(urls.HTTP)
        self.path: PurePath = PurePosixPath(unquote(urlsplit(name).path) if self._is_http else name)
        """What its name and ending are taken from."""
        self.label = well_formed(self.path.name)
        """How messages of its rows call it."""
        self._content: io.BufferedIOBase | None = None
        self._state: object = None

    @property
    def is_here(self) -> bool:
        """Whether it is of this machine's file system."""
        return self._fs is None

    @property
    def is_repository(self) -> bool:
        """Whether it is of the Hugging Face Hub, where data sets lie in a folder of their own."""
        return self._fs is not None and "hf" in self._fs.protocol

    def is_folder(self) -> bool:
        """Whether it is a folder; on a web server, whether it is called like one."""
        if self._fs is None:
            return os.path.isdir(self.name)
        if self._is_http:
            return self.name.endswith("/")
        with urls.in_one_line(self.shown):
            return bool(self._fs.isdir(self.name))

    def files(self) -> list[str]:
        """Names of the files in a folder and in those below it, in order, relative to it. Hidden
        ones are passed over. On a web server, what the folder's page links to."""
        if self._fs is None:
            names = []
            # Follows no links: some lead in circles.
            for top, folders, found in os.walk(self.name, onerror=_fail):
                folders[:] = [name for name in folders if not is_hidden(name)]
                names += [os.path.relpath(os.path.join(top, name), self.name) for name in found]
        else:
            with urls.in_one_line(self.shown):
                if self._is_http:
                    entries = self._fs.ls(self.name, detail=True)
                    found = [entry["name"] for entry in entries if entry["type"] == "file"]
                else:
                    found = self._fs.find(self.name)
            names = [name.removeprefix(self.name.rstrip("/") + "/") for name in found]
        return sorted(name for name in names if not any(map(is_hidden, name.split("/"))))

    def child(self, name: str) -> Place:
        """What has this name in this folder."""
        return Place(
            f"{self.name.rstrip('/')}/{name}", self._fs, f"{self.shown.rstrip('/')}/{name}"
        )

    def _sibling(self, name: str) -> Place:
        """What has this name beside it."""
        own = self.name.partition("?")[0] if self._is_http else self.name
        before, after = own[: own.rfind("/") + 1], self.name[len(own) :]
        return Place(f"{before}{name}{after}", self._fs, f"{self.shown} ({name} beside it)")

    def exists(self) -> bool:
        """Whether there is something."""
        if self._fs is None:
            return os.path.exists(self.name)
        with urls.in_one_line(self.shown):
            return bool(self._fs.exists(self.name))

    def take(self) -> None:
        """Get hold of the content. What is behind a URL or compressed goes into a temporary file
        without a name, which leaves nothing behind even where the process is killed.

        Raises:
            SourceError: it cannot be had, or there is no room where temporary files go.
            OSError: a file here cannot be opened.
        """
        if self._fs is None:
            self._state = _state_of(self.name)
            file: io.BufferedIOBase = open(self.name, "rb")  # noqa: SIM115 - see below
        else:
            with tempfile.TemporaryDirectory(prefix="ep-rft-") as folder:
                copy = os.path.join(folder, "copy")
                self._copy_to(copy)
                file = open(copy, "rb")  # noqa: SIM115 - see below
        codec = _CODECS.match(file.read(10))
        file.seek(0)
        if codec is not None:
            with file:
                self._content = _uncompressed(file, self.label, str(codec.lastgroup))
        elif self._fs is not None:
            self._content = file
        else:
            file.close()

    def _copy_to(self, target: str) -> None:
        with urls.in_one_line(self.shown):
            # What a web server sends for one request is of one state.
            before = None if self._is_http else urls.remote_state(self._fs, self.name)
            urls.get_file(self._fs, self.name, target)
            if before is not None and urls.remote_state(self._fs, self.name) != before:
                raise SourceError(
                    f"{self.shown} changed while it was copied: run again when nobody writes to it"
                )

    def open(self) -> io.BufferedIOBase:
        """The content, from its start."""
        if self._content is None:
            return open(self.name, "rb")
        file = os.fdopen(os.dup(self._content.fileno()), "rb")
        file.seek(0)
        return file

    def arrow_file(self) -> str | pa.Buffer:
        """The content as Arrow opens it."""
        import pyarrow as pa

        if self._content is None:
            return self.name
        return pa.py_buffer(mmap.mmap(self._content.fileno(), 0, access=mmap.ACCESS_READ))

    @property
    def is_plain(self) -> bool:
        """Whether it can be read as it is by whoever takes a path."""
        return self._fs is None and (plain_name(self.path) == self.path or self.is_folder())

    @contextlib.contextmanager
    def here(self, beside: str = "") -> Iterator[Path]:
        """A file that can be read as it is: this one, or a copy of its content under its own name,
        which is gone afterwards. Errors within call it as it is called here.

        Args:
            beside: ending of the name of a file that belongs to it, copied too where it is there.

        Raises:
            SourceError: it cannot be had.
        """
        if self.is_plain or not self.exists():
            yield Path(self.name)
            return
        if self.is_folder():
            raise SourceError(f"{self.shown}: a folder; name the file in it")
        with tempfile.TemporaryDirectory(prefix="ep-rft-") as folder:
            copy = Path(folder) / plain_name(self.path).name
            self._save(copy)
            other = self._sibling(copy.name + beside)
            if beside and other.exists():
                other._save(Path(folder) / other.path.name)
            with called(copy, self.shown):
                yield copy

    def _save(self, path: Path) -> None:
        self.take()
        try:
            with self.open() as file, path.open("wb") as target:
                shutil.copyfileobj(file, target, _PIECE_BYTES)
        except OSError as error:
            raise SourceError(urls.no_room(f"{self.shown}: it is copied", error)) from error

    def fingerprint(self) -> str:
        """Hex SHA-256 of the content."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def has_changed(self) -> bool:
        """Whether somebody wrote to a file here since `take`. A copy stays what it was."""
        return self._fs is None and _state_of(self.name) != self._state


def _fail(error: OSError) -> None:
    raise error


def is_hidden(name: str) -> bool:
    """Whether a file or folder is nobody's data: names that begin with a dot or an underscore are
    of file systems (`._part.parquet` of a Mac) or of those who write (`_SUCCESS`), and no reader of
    shards takes them."""
    return name.startswith((".", "_"))


def places(given: PathOrGlob) -> list[Place]:
    """What a path, a pattern or a URL means: what is there by that name, or all that it matches.

    Raises:
        SourceError: nothing; or a URL cannot be understood or reached.
    """
    if urls.is_url(given):
        return _remote_places(os.fspath(given))
    text = os.path.abspath(_path_of(given))  # only the absolute path of "." has the folder's name
    if os.path.lexists(text):
        return [Place(text)]
    if not glob.has_magic(text):
        raise SourceError(f"{text}: no such file or folder")
    return _matching(text, [Place(name) for name in glob.glob(text, recursive=True)])


def _remote_places(url: str) -> list[Place]:
    if "://" not in url and "::" not in url:
        raise SourceError(f"{url}: a URL must be given as text: a Path drops one of its slashes")
    with urls.in_one_line(urls.shown(url)):
        fs, name = urls.file_system(url)
        fs.invalidate_cache()  # of a process that lives long
        is_http = name.startswith(urls.HTTP)
        if "*" in urlsplit(name).path if is_http else glob.has_magic(name) and not fs.exists(name):
            found = [
                Place(each, fs, urls.shown(fs.unstrip_protocol(each))) for each in fs.glob(name)
            ]
            return _matching(urls.shown(url), found)
        if not is_http and not fs.exists(name):
            raise FileNotFoundError(name)
        return [Place(name, fs, urls.shown(url))]


def _matching(pattern: str, found: list[Place]) -> list[Place]:
    if not is_hidden(PurePosixPath(pattern).name):
        found = [place for place in found if not is_hidden(place.path.name)]
    if not found:
        raise SourceError(f"{pattern}: no file has such a name")
    return sorted(found, key=lambda place: place.name)


def _state_of(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _uncompressed(file: io.BufferedIOBase, label: str, codec: str) -> io.BufferedIOBase:
    """The content in an unnamed temporary file, so that rows can be had in any order."""
    import pyarrow as pa

    content = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the data set
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)
    while True:
        try:
            piece = stream.read(_PIECE_BYTES)
        except OSError as error:
            raise SourceError(f"{label}: cannot be decompressed: {error}") from error
        if not piece:
            return content
        try:
            content.write(piece)
            content.flush()
        except OSError as error:
            raise SourceError(urls.no_room(f"{label}: it is decompressed", error)) from error


def one_place(given: PathOrGlob) -> Place:
    """What a path, a URL, or a pattern that one file has, means. A path may name nothing: what is
    not there yet.

    Raises:
        SourceError: a pattern that none has, or several; a URL behind which there is nothing.
    """
    if not urls.is_url(given):
        path = _path_of(given)
        if os.path.lexists(path) or not glob.has_magic(path):
            return Place(str(Path(path)))
    found = places(given)
    if len(found) > 1:
        raise SourceError(
            f"{urls.shown(given)}: {len(found)} files have such a name, such as {found[0].shown} "
            f"and {found[1].shown}: name one"
        )
    return found[0]


@contextlib.contextmanager
def called(copy: Path, name: str) -> Iterator[None]:
    """Within, errors of this package call a copy by the name that the user knows."""
    try:
        yield
    except EvalProtocolRftError as error:
        error.args = tuple(
            text.replace(str(copy), name) if isinstance(text, str) else text for text in error.args
        )
        raise
