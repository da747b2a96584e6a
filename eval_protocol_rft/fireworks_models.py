"""Whose tokenizer a model of Fireworks has, by what the service says of it.

Invariant: nothing is guessed from a name. Either the service names a model on the Hugging Face hub,
for the model itself or for the one that it was made of, or there is no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.sampling.bodies import read_body
from eval_protocol_rft.sampling.clock import Deadline
from eval_protocol_rft.sampling.http import NO_CLOCKS, endpoint_headers, proxy_for
from eval_protocol_rft.sampling.types import SamplingError

SECONDS = 20.0
"""For all questions about one model."""
_MOST_BYTES = 1 << 20
_LONGEST_CHAIN = 5
"""Deployment, adapter, model it was tuned from, ... are two or three."""
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")


async def hub_id_of(model: str, endpoint: Endpoint) -> tuple[str | None, str]:
    """The hub id that belongs to `model` (`accounts/.../models/...`, also a deployment or a
    deployed model, with or without `#deployment` and `@version`), and where there is none, why."""
    name = re.split("[#@]", model)[0]
    try:
        async with Deadline(SECONDS), aiohttp.ClientSession(timeout=NO_CLOCKS) as session:
            for _ in range(_LONGEST_CHAIN):
                resource = await _resource(session, name, endpoint)
                if hub := _HUB.match(str(resource.get("huggingFaceUrl") or "")):
                    return hub[1], ""
                made_of = _made_of(resource)
                if made_of is None:
                    return None, f"Fireworks names no Hugging Face model for {name}"
                name = made_of
    except TimeoutError:
        return None, f"Fireworks said nothing of {name} within {SECONDS:g} s"
    except (aiohttp.ClientError, OSError, ValueError, SamplingError) as error:
        return None, f"asked about {name}, Fireworks answered {str(error) or type(error).__name__}"
    return None, f"{name} is made of models too many to follow"


def _made_of(resource: Mapping[str, Any]) -> str | None:
    """The model that has the same tokenizer: an adapter's base, what a deployment serves."""
    peft = resource.get("peftDetails")
    named = (
        peft.get("baseModel") if isinstance(peft, Mapping) else None,
        resource.get("baseModel"),
        resource.get("model"),
        resource.get("importedFrom"),
    )
    return next(
        (re.split("[#@]", v)[0] for v in named if isinstance(v, str) and v.startswith("accounts/")),
        None,
    )


async def _resource(
    session: aiohttp.ClientSession, name: str, endpoint: Endpoint
) -> Mapping[str, Any]:
    """What `GET /v1/{name}` answers.

    Raises:
        ValueError: it is no 200, or no JSON object.
    """
    url = f"{_control_plane(endpoint)}/v1/{name}"
    async with session.get(
        url, headers=endpoint_headers(endpoint), proxy=proxy_for(url), allow_redirects=False
    ) as response:
        if response.status != 200:
            raise ValueError(f"{response.status}")
        body = await read_body(response, limit=_MOST_BYTES)
    resource = json.loads(body)
    if not isinstance(resource, dict):
        raise ValueError("no JSON object")
    return resource


def _control_plane(endpoint: Endpoint) -> str:
    """The inference address without its path; a direct route has no control plane of its own."""
    parts = urlsplit(endpoint.base_url)
    if (parts.hostname or "").endswith(".direct.fireworks.ai"):
        return "https://api.fireworks.ai"
    path = parts.path.removesuffix("/v1").removesuffix("/inference")
    return f"{parts.scheme}://{parts.netloc}{path}"
