"""Any `Sampler` over HTTP in Fireworks' shape, for loopback: `ep-rft serve`. Extra: `serve`.

`_app.create_app` is the ASGI application, `_work` what it does for one request, `_serving` what the
command line does around it, `_weights` how it is given new weights. `_protocol` (requests in) and
`_reply_bodies` (replies out) are pure. `_app.CompletionEndpoints` serves any number of models in an
application of somebody else's.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
