"""Any agent, unchanged, by its base URL: a server that speaks the protocols of agents' clients,
samples token ids, and keeps every call exact to the token.

Invariant: what was sampled is kept as it was, for its own session alone; what a client changed in
the history that it sends back is on record, never repaired.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
