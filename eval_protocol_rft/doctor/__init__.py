"""`ep-rft doctor`: whether a setup (tokenizer, template, server, weights) is fit to train with.

Invariant: a check is pure: numbers in, `Finding` out, with what was measured and the bar that it
was held to. `_probe` alone asks the server; `_examination` puts the checks in order. A check that
could not be made says so; it never passes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
