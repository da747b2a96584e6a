"""The sampler in this process and its HTTP face; the bundled model. Needs the extra `local`.

Invariant: what it samples has the shape, the promises and the errors of a server's completions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
