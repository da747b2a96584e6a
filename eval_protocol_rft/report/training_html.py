"""Pages from a template, with a policy that lets nothing but their own script run. Pure.

Invariant: text from settings and errors is escaped by the template, and the page asks no network
for anything: its head allows one script and one style sheet by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from eval_protocol_rft.report.page import visible


def render(
    template: str,
    values: Mapping[str, Any],
    *,
    scripts: Sequence[str],
    styles: Sequence[str],
    data: str,
) -> str:
    """The text of a page.

    Args:
        template: its name among the assets.
        values: for the template.
        scripts, styles: names of assets, joined to one script and one style sheet.
        data: JSON for the script, escaped as `embedded_json` does.
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
    script, style = _assets(scripts), _assets(styles)
    return environment.get_template(template).render(
        **values,
        script=Markup(script),  # noqa: S704
        script_hash=_policy_hash(script),
        style=Markup(style),  # noqa: S704
        style_hash=_policy_hash(style),
        data=Markup(data),  # noqa: S704
    )


def _assets(names: Sequence[str]) -> str:
    folder = resources.files("eval_protocol_rft.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _policy_hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
