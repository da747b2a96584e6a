"""Evaluators over many stored completions: in this loop, in processes of their own, or on Ray.

Invariant: whatever an evaluator does (fork, exec, kill, hang, write anywhere) costs its own
completion at most, and an answer belongs to the call that asked for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
