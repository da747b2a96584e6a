"""`ep-rft`: the command line. Thin: every command imports its own module when it runs, so that
`--help` costs nothing, and turns that module's errors into one line and exit code 1.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="ep-rft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ep-rft {metadata.version('eval-protocol-rft')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Token-exact reinforcement learning data from Eval Protocol evaluators."""


_SERVE_HELP = """Serve a local model over HTTP, in the shape of Fireworks' completions API.

\b
Examples:
  ep-rft serve
  ep-rft serve --model local/Qwen/Qwen3-0.6B --port 9000
  ep-rft serve --model ./checkpoint --served-model-name policy
"""


@app.command(help=_SERVE_HELP)
def serve(
    model: Annotated[
        str,
        typer.Option(
            help="local/arithmetic (bundled), or a model folder or hub id, as local/NAME or NAME."
        ),
    ] = "local/arithmetic",
    host: Annotated[
        str, typer.Option(help="Address to listen on. There is no authentication: keep it local.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.", show_default="the value of --model"),
    ] = None,
) -> None:
    try:
        from eval_protocol_rft.server.run import ServeError, serve_local
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        _fail(
            f"serve needs {package}, which is not installed: "
            "pip install 'eval-protocol-rft[local,serve]'"
        )
    try:
        serve_local(
            model, host=host, port=port, served_model_name=served_model_name, say=typer.echo
        )
    except ServeError as error:
        _fail(str(error))


_SHOW_HELP = """Show rollouts that Eval Protocol wrote: prompts, completions, rewards, sums.

\b
Examples:
  EP_OUTPUT_DIR=results pytest examples/arithmetic && ep-rft show results
  ep-rft show results/2026-run.jsonl --limit 50
"""


@app.command(help=_SHOW_HELP)
def show(
    paths: Annotated[
        list[Path],
        typer.Argument(help="JSONL files; a folder stands for the newest one below it."),
    ],
    limit: Annotated[int, typer.Option(min=0, help="Rows to show of each file.")] = 10,
    pass_threshold: Annotated[
        float, typer.Option(help="Reward from which on a completion counts as passed.")
    ] = 1.0,
) -> None:
    from rich.console import Console

    from eval_protocol_rft.report.rows import RowsFileError, newest_rows_file, read_rows
    from eval_protocol_rft.report.terminal import rollout_table

    console = Console()
    for path in paths:
        try:
            rows = list(read_rows(newest_rows_file(path)))
        except RowsFileError as error:
            _fail(str(error))
        console.print(rollout_table(rows, limit=limit, pass_threshold=pass_threshold))


def _fail(message: str) -> NoReturn:
    typer.echo(f"ep-rft: {message}", err=True)
    raise typer.Exit(1)
