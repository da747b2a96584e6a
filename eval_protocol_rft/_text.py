"""What others (models, servers, evaluators, environments) hand to us: text on its way to a file or
a terminal, and copies of this process that their code forks.

Invariant: whatever a text holds costs a character, never the file, the run or the terminal. Only
the process that made a call goes on behind it: a copy would write the same files, send the same
requests and answer the same calls once more.
"""

from __future__ import annotations

import os
import re
from typing import Any


def well_formed(text: str) -> str:
    """The text as UTF-8 can hold it: half of a surrogate pair becomes U+FFFD, two halves that
    belong together their character. `json.loads` of what a model wrote makes such halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def well_formed_json(value: Any) -> Any:
    """JSON values with every text `well_formed`, keys too; what needs no change is shared."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, dict):
        mended: dict[Any, Any] = {}
        for key, item in value.items():
            name = well_formed(key) if isinstance(key, str) else key
            while name in mended:
                name += "\ufffd"  # two keys that only differed in their halves
            mended[name] = well_formed_json(item)
        return mended
    if isinstance(value, list | tuple):
        return [well_formed_json(item) for item in value]
    return value


def text_of(value: object) -> str:
    """`str(value)`, well formed; an object of others whose `__str__` raises is told by its type."""
    try:
        return well_formed(str(value))
    # It is the user's: it raises whatever its expressions raise.
    except Exception as error:  # noqa: BLE001
        return f"({type(value).__name__}, whose text raised {type(error).__name__})"


_URL_USER = re.compile(r"(?<=://)[^/?#\s]+@")


def without_url_users(text: str) -> str:
    """The text with `user:password@` cut out of its URLs."""
    return _URL_USER.sub("", text)


def visible(text: str) -> str:
    """One line that no terminal takes for a command: what is not printable is shown as Python
    escapes it, line breaks too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible_lines(text: str) -> str:
    """As `visible`, but line breaks and tabs stay."""
    parts = text.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(visible, part.split("\t"))) for part in parts)


def end_copy_of(process: int) -> None:
    """End this process at once, without a word or an exit handler, unless it is `process`."""
    if os.getpid() != process:
        os._exit(0)
