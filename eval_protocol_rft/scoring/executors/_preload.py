"""Imported in the fork server, and so at once in every worker forked from it: what all need.

The environment is set first, because importing Eval Protocol reads it. The user's module is not
here: one that starts threads or opens a device when imported must do so after the fork.
"""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("EP_NO_UPLOAD", "1")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

# Recorded, not shown: deprecations inside libraries, which would be printed for every run.
with warnings.catch_warnings(record=True):
    import eval_protocol.pytest  # noqa: F401

    import eval_protocol_rft.scoring.executors._call  # noqa: F401
