"""Pages from templates: one file each, with a policy that lets nothing but its own script run.

Invariant: text of others (models, settings, errors) is escaped by the template, and embedded data
cannot end the element that they stand in. The page asks no network for anything: its head allows
one script and one style sheet by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.report._svg import theme

if TYPE_CHECKING:
    from markupsafe import Markup

Facts = list[tuple[str, str]]
"""Names and values, to be shown one below the other."""


class ReportError(EvalProtocolRftError, ValueError):
    """The report cannot be made; the message says what is in the way and where."""


def check_installed() -> None:
    """See to it that a page can be drawn, before anything is read for it.

    Raises:
        ReportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("the charts of a page need matplotlib: pip install matplotlib")


def render(
    template: str, values: dict[str, Any], *, scripts: Sequence[str], styles: Sequence[str]
) -> Iterator[str]:
    """The text of a page, piece by piece.

    Args:
        template: its name among the assets.
        values: for the template.
        scripts, styles: names of assets, joined to one script and one style sheet.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("eval_protocol_rft.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    script, style = _assets(scripts), f"{theme()}\n{_assets(styles)}"
    return environment.get_template(template).generate(
        {"version": metadata.version("eval-protocol-rft"), **values},
        script=Markup(script),  # noqa: S704
        script_hash=_policy_hash(script),
        style=Markup(style),  # noqa: S704
        style_hash=_policy_hash(style),
    )


def visible(text: str) -> str:
    """`text` with characters that cannot be seen, or that turn others around, as their numbers."""
    return "".join(c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in text)


def embedded_json(value: Any) -> Markup:
    """JSON that can stand in a script element as it is: no character of it means anything to an
    HTML parser."""
    from markupsafe import Markup

    return Markup(msgspec.json.encode(value).decode().translate(_ESCAPES))  # noqa: S704


def packed(value: Any) -> Markup:
    """JSON, deflated (RFC 1950), in base64, which has nothing to escape."""
    from markupsafe import Markup

    return Markup(base64.b64encode(zlib.compress(msgspec.json.encode(value), 6)).decode())  # noqa: S704


_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def _assets(names: Sequence[str]) -> str:
    folder = resources.files("eval_protocol_rft.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _policy_hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
