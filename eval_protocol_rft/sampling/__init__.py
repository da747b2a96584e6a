"""From prompt ids to completions, over HTTP: wire, replies, retries, breaker, limits, fan-out.

Invariant: a completion is exact (ids and logprobs as the server sent them) or a typed failure.
Knows nothing of rows or of Eval Protocol. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
