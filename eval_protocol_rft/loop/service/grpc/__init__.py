"""The control plane over gRPC, for the generation of clients that speaks it. Extra: `grpc`.

`fireworks.LLM`, `Dataset` and `reinforcement_step` of fireworks-ai 0.19 ask for models,
deployments, data sets and steps over gRPC, and for everything else over HTTP. `_messages` knows
their messages, `_transcoding` each method's counterpart over HTTP, `_server` listens.

Raises:
    ModuleNotFoundError: the extra is not there; the message names it.
"""

try:
    from eval_protocol_rft.loop.service.grpc._server import GrpcServer, serve_grpc
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("grpc", "google"):
        raise
    raise ModuleNotFoundError(
        f"{error.name} is needed to serve gRPC: pip install 'eval-protocol-rft[grpc]'",
        name=error.name,
    ) from error

__all__ = ["GrpcServer", "serve_grpc"]
