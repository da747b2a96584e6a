"""Turn any Eval Protocol evaluator into exact, fully scored token data for reinforcement learning.

Public names load on first use: importing Eval Protocol costs seconds, and what does not need it
(sampling, training, the command line's help) must not pay for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
