"""`ep-rft serve`. These are the only definitions of its options: the server is started here alone,
and `eval_protocol_rft.local.server` needs the extra `serve` to be imported."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from eval_protocol_rft._options import Flag
from eval_protocol_rft.cli._common import fail, say


def serve(
    *,
    model: str = "local/arithmetic",
    host: str = "127.0.0.1",
    port: Annotated[int, Ge(0), Le(65535)] = 8000,
    served_model_name: Annotated[str | None, Flag(unset="--model without local/")] = None,
    api_key: Annotated[str | None, Flag(env="EP_RFT_SERVE_API_KEY", unset="none")] = None,
    reloads: bool = False,
) -> None:
    """Serve a local model over HTTP, in the shape of Fireworks' completions API.

    Args:
        model: local/arithmetic (bundled), or a model folder or hub id, as local/NAME or NAME.
        host: Address to listen on. For others than this machine set --api-key too.
        port: Port to listen on; 0 takes a free one.
        served_model_name: What requests call the model.
        api_key: Asked of every request, as 'Authorization: Bearer KEY'.
        reloads: Take new weights while serving, as vLLM does (/collective_rpc reload_weights):
            whoever reaches the port may change the weights.

    Examples:
      ep-rft serve
      ep-rft serve --model local/Qwen/Qwen3-0.6B --port 9000
      ep-rft serve --model ./checkpoint --served-model-name policy
      ep-rft serve --model ./checkpoint --reloads   # for ep-rft train --base-url
      EP_RFT_SERVE_API_KEY=... ep-rft serve --host 0.0.0.0   # for other machines
    """
    try:
        from eval_protocol_rft.local.server import serve_local
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        fail(
            f"serve needs {package}, which is not installed: "
            "pip install 'eval-protocol-rft[local,serve]'"
        )
    serve_local(
        model,
        host=host,
        port=port,
        served_model_name=served_model_name,
        reloads=reloads,
        api_key=api_key,
        say=say,
    )
