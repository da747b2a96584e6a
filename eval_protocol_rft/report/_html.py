"""Pages from templates: one file each, with a policy that lets nothing but its own script run; and
the facts in their heads.

Invariant: text of others (models, settings, errors) is escaped by the template, and embedded data
cannot end the element that they stand in. The page asks no network for anything: its head allows
one script and one style sheet by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.report._svg import theme

if TYPE_CHECKING:
    from markupsafe import Markup

    from eval_protocol_rft.data import FileMetadata, SamplingSettings

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


def sampling_facts(sampling: SamplingSettings) -> Facts:
    """How the completions were sampled."""
    parameters = [
        f"temperature {sampling.temperature:g}",
        f"top_p {sampling.top_p:g}",
        f"top_k {sampling.top_k}" if sampling.top_k > 0 else "top_k off",
    ]
    if sampling.max_tokens is not None:
        parameters.append(f"max_tokens {sampling.max_tokens}")
    parameters.append(f"n {sampling.n}")
    if sampling.seed is not None:
        parameters.append(f"seed {sampling.seed}" + ("" if sampling.seed_given else " (drawn)"))
    facts = [
        ("Model", sampling.model),
        ("Tokenizer", sampling.tokenizer or "not recorded"),
        ("Sampling", ", ".join(parameters)),
    ]
    if sampling.support_truncated:
        facts.append(("Note", "part of the vocabulary could not be drawn (top_p, top_k or alike)"))
    for name, value in (
        ("Stop", sampling.stop),
        ("System", sampling.system),
        ("Chat template options", sampling.chat_template_kwargs),
        ("Further options", sampling.other),
    ):
        if value:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            facts.append((name, text))
    if sampling.chat_template_hash:
        facts.append(("Chat template hash", sampling.chat_template_hash))
    return facts


def data_facts(metadata: FileMetadata) -> Facts:
    """Which prompts they are, and what the policy talked with."""
    facts: Facts = []
    if (data := metadata.data) is not None:
        chosen = [f"{data.num_rows:,} rows"]
        if data.where is not None:
            chosen.append(f"where {data.where}")
        if data.shuffle_seed is not None:
            chosen.append(f"shuffled with seed {data.shuffle_seed}")
        if data.limit is not None:
            chosen.append(f"limited to {data.limit:,}")
        facts.append(("Data set", f"{data.name} ({', '.join(chosen)})"))
        facts.append(("Its SHA-256", data.fingerprint[:16]))
    if (episodes := metadata.episodes) is not None:
        limits = (f"{name} {value:,.10g}" for name, value in episodes.limits.items())
        facts.append(("Environment", episodes.environment))
        facts.append(("Limits of an episode", ", ".join(limits).replace("_", " ")))
        facts.append(("Rewritten history", episodes.on_rewrite))
    return facts


def setting_facts(settings: Mapping[str, Any]) -> Facts:
    """The settings that a reader asks for first; those that a run did not record are left out."""
    sampling = settings.get("completion_params") or {}
    n = settings.get("completions_per_prompt") or sampling.get("n")
    facts = [
        ("Model", sampling.get("model")),
        ("Algorithm", _joined(settings.get("algorithm"), _named(settings, "normalization"))),
        (
            "Batch",
            _joined(
                _counted(settings.get("groups_per_step"), "prompts"),
                _counted(n, "completions each"),
                _counted(settings.get("passes"), "passes") if settings.get("passes") != 1 else None,
            ),
        ),
        (
            "Learning rate",
            _joined(
                _value(settings.get("learning_rate")),
                settings.get("schedule"),
                _named(settings, "warmup_steps", zero=False),
                _named(settings, "kl_beta", zero=False),
            ),
        ),
        ("Most staleness", _counted(settings.get("max_staleness"), "versions")),
        ("Sampling", _joined(*(_named(sampling, k) for k in sampling if k not in ("model", "n")))),
        (
            "Rows",
            _joined(
                _counted(settings.get("train_rows"), "to train on"),
                _counted(settings.get("eval_rows"), "held out"),
            ),
        ),
        ("Seed", _value(settings.get("seed"))),
    ]
    return [(name, value) for name, value in facts if value]


def all_settings(settings: Mapping[str, Any]) -> Facts:
    """Every setting as it was recorded."""
    return [(name, json.dumps(settings[name], sort_keys=True)) for name in sorted(settings)]


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _named(settings: Mapping[str, Any], name: str, *, zero: bool = True) -> str | None:
    value = settings.get(name)
    if value is None or (not zero and not value):
        return None
    return f"{name} {_value(value)}"


def _counted(value: Any, what: str) -> str | None:
    if value is None:
        return None
    return f"{value:,} {what.removesuffix('s') if value == 1 else what}"


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
