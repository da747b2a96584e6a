"""Several turns: conversations as exact ids, environments, tools, and the processor for them.

Invariant: what was sampled is kept as it was; an environment sees messages and never tokens, and
whatever it does (raise, hang, answer nonsense) costs its own episode and no other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
