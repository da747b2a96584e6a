"""Eval Protocol's seam: processors, completion_params, prompts, tokenizers, answers.

Invariant: a row is changed in one step, at its end, or not at all; and what its evaluator sees is
what Eval Protocol's own processor would have shown. Names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
