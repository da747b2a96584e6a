"""A Fireworks on this machine: `ep-rft serve --fireworks`. Extras: `serve`, `local`.

One process that samples, trains and keeps account as the service does, for clients that do not
know the difference. Its shapes are what the client libraries send and read; it is no evidence of
what the service itself does beyond that.

`_store` remembers resources and `_weights` models; both are on disk before anything is answered, so
the process may die at any moment. On them stand `control` (what there is), `training` (what trainer
jobs do) and `inference` (what is sampled); `grpc` is the control plane's second face. `_app` puts
them together, with the log of `_requests` around them; `_command` is the command. `_errors` is how
it says no, `_names` what things are called.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
