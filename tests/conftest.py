"""Shared fixtures. The environment is set before anything imports Eval Protocol."""

from __future__ import annotations

import os

# No network, no uploads, no database of runs in the home folder.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["EP_NO_UPLOAD"] = "1"
os.environ["DISABLE_EP_SQLITE_LOG"] = "1"
os.environ["EP_DISABLE_AUTO_BROWSER"] = "1"
for _name in ("EP_LLM_API_BASE", "EP_LLM_BASE_URL", "FIREWORKS_BASE_URL", "FIREWORKS_API_KEY"):
    os.environ.pop(_name, None)
