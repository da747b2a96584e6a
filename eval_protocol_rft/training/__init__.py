"""From scored rows to training datums: small, pure and fast.

Arrows inside: rows -> groups -> filters -> advantages -> batch. Nothing here imports Eval
Protocol, torch or a trainer's package; names load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
