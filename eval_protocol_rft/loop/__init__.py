"""Closing the loop: sample, score, step, publish, again.

Invariant: no step is taken on tokens that the trainer and the sampler price differently, and a run
that was killed goes on as if it had not been. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
