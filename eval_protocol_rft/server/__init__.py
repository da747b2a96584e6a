"""Any `Sampler` over HTTP in Fireworks' shape, for loopback: `ep-rft serve`. Extra: `serve`.

`app.create_app` is the ASGI application, `run` what the command line does around it. `protocol`
(requests in), `replies` (replies out) and `spelling` (ids to text) are pure.
"""
