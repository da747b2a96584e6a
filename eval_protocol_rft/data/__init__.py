"""Rollouts in bulk: generate once, score many times, filter, convert, and look at them.

    from eval_protocol_rft import data

    data.generate("problems.jsonl", "rollouts.parquet", {"model": "local/arithmetic", "n": 8})
    data.score("rollouts.parquet", "tests/test_math.py::test_math")

Invariant: what was paid for is on disk, and nothing is lost in silence. Names load on first use. In
a notebook, where an event loop runs, `await data.agenerate(...)`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
