"""One score per completion: `@score_each_completion`, and scoring rows again later.

Invariant: unscored (None) differs from scored 0.0, whatever the evaluator did. Names load on first
use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
