"""What counts as a credential among request settings, and how settings are stored without it.

Invariant: a credential is left out, never masked. A masked value would be sent as if it were the
key when the stored settings are used again; an absent one is looked up anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

SECRET_KEYS = frozenset(
    {
        "access_key",
        "api_key",
        "apikey",
        "auth",
        "authentication",
        "authorization",
        "bearer",
        "cookie",
        "cookies",
        "credential",
        "credentials",
        "headers",
        "jwt",
        "passphrase",
        "passwd",
        "password",
        "private_key",
        "secret",
        "secrets",
        "subscription_key",
    }
)
"""Words that make a key a credential wherever they stand in it: `X-Api-Key`, `awsAccessKeyId`.
Headers go as a whole: a gateway's secret may stand under any name."""

VOCABULARY_TOKENS = frozenset(
    {"bos", "cls", "end", "eos", "image", "mask", "pad", "sep", "start", "stop", "unk"}
)
"""`<word>_token` names a token of a vocabulary after these; after anything else, a credential."""

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_A_WORD = re.compile(r"[^a-z0-9]+")
_URL_USER = re.compile(r"(?<=://)[^/?#@\s]+@")


def is_secret_key(key: str) -> bool:
    """True where `key` names a credential, whatever its spelling (`apiKey`, `X-API-Key`)."""
    words = _NOT_A_WORD.sub("_", _WORD_START.sub("_", key).lower()).strip("_")
    if any(f"_{secret}_" in f"_{words}_" for secret in SECRET_KEYS):
        return True
    *before, last = words.split("_")
    return last == "token" and not VOCABULARY_TOKENS.intersection(before)


def redact_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of request settings without credentials; `params` stays as it is.

    Goes through nested mappings and sequences (`extra_headers`, `extra_body`) and through strings
    that hold a JSON object, and cuts `user:password@` out of URLs. Containers are new, other
    values are shared.
    """
    return {key: _clean(value) for key, value in params.items() if not is_secret_key(str(key))}


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_params(value)
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return _clean_text(value)
    return value


def _clean_text(text: str) -> str:
    if text.lstrip().startswith("{"):
        try:
            parsed = json.loads(text)
        except ValueError:
            return text
        cleaned = redact_params(parsed)
        return text if cleaned == parsed else json.dumps(cleaned)
    return _URL_USER.sub("", text)
