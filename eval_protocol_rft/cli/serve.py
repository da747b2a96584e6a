"""`ep-rft serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from eval_protocol_rft.cli._common import fail, one_line, say


@one_line
def serve(
    model: Annotated[
        str,
        typer.Option(
            help="local/arithmetic (bundled), or a model folder or hub id, as local/NAME or NAME."
        ),
    ] = "local/arithmetic",
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. For others than this machine set --api-key too."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.", show_default="--model without local/"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="EP_RFT_SERVE_API_KEY",
            help="Asked of every request, as 'Authorization: Bearer KEY'.",
            show_default="none",
        ),
    ] = None,
    reloads: Annotated[
        bool,
        typer.Option(
            "--reloads",
            help="Take new weights while serving, as vLLM does (/collective_rpc reload_weights): "
            "whoever reaches the port may change the weights.",
        ),
    ] = False,
) -> None:
    """Serve a local model over HTTP, in the shape of Fireworks' completions API.

    \b
    Examples:
      ep-rft serve
      ep-rft serve --model local/Qwen/Qwen3-0.6B --port 9000
      ep-rft serve --model ./checkpoint --served-model-name policy
      ep-rft serve --model ./checkpoint --reloads   # for ep-rft train --base-url
      EP_RFT_SERVE_API_KEY=... ep-rft serve --host 0.0.0.0   # for other machines
    """
    try:
        from eval_protocol_rft.local.server import ServeError, serve_local
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        fail(
            f"serve needs {package}, which is not installed: "
            "pip install 'eval-protocol-rft[local,serve]'"
        )
    try:
        serve_local(
            model,
            host=host,
            port=port,
            served_model_name=served_model_name,
            reloads=reloads,
            api_key=api_key,
            say=say,
        )
    except ServeError as error:
        fail(str(error))
