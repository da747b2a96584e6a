"""`ep-rft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval_protocol_rft.cli._common import one_line, say, sigterm_interrupts
from eval_protocol_rft.cli.train_run import run_training, show_result

_RUN = "What to run"
_HOW = "How to train"
_MODEL = "The model"
_EVAL = "Evaluation and files"
_FIREWORKS = "On Fireworks"


@one_line
def train(
    evaluator: Annotated[
        str,
        typer.Argument(
            help="tests/test_x.py::test_x, an evaluation test: its data, processor and evaluator."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the run.", rich_help_panel=_RUN)
    ] = Path("run"),
    model: Annotated[
        str | None,
        typer.Option(
            help="local/FOLDER, local/arithmetic, or the name that a server knows.",
            show_default="the test's",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Sample from this server; it takes new weights as vLLM in its development mode "
            "does, or `ep-rft serve --reloads`.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the weights that the server serves.", rich_help_panel=_MODEL),
    ] = None,
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train LoRA adapters of this rank; 0: all parameters.",
            rich_help_panel=_MODEL,
        ),
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for so many steps.", rich_help_panel=_RUN)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Or go through the data so often.",
            show_default="1 without --steps",
            rich_help_panel=_RUN,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of the test's data set: Parquet, JSONL, JSON, CSV or TSV, text also "
            "as .gz or .zst: files, folders, patterns; repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    groups_per_step: Annotated[
        int, typer.Option(min=1, help="Prompts with a gradient per step.", rich_help_panel=_HOW)
    ] = 32,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--completions-per-prompt",
            min=1,
            help="Completions per prompt.",
            show_default="the test's n",
            rich_help_panel=_HOW,
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="grpo, cispo, dapo, gspo, dr_grpo, rloo, ... (docs/training.md)",
            rich_help_panel=_HOW,
        ),
    ] = "grpo",
    learning_rate: Annotated[
        float,
        typer.Option(
            "--lr", "--learning-rate", help="Of AdamW, at its peak.", rich_help_panel=_HOW
        ),
    ] = 1e-5,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="constant|linear|cosine",
            rich_help_panel=_HOW,
            help="How the learning rate goes on after the warm-up.",
        ),
    ] = "constant",
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps over which it rises.", rich_help_panel=_HOW)
    ] = 0,
    max_staleness: Annotated[
        int,
        typer.Option(
            min=0,
            help="Sample ahead by so many versions of the weights; 0: take turns.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    passes: Annotated[
        int, typer.Option(min=1, help="Optimiser steps on each batch.", rich_help_panel=_HOW)
    ] = 1,
    normalization: Annotated[
        str,
        typer.Option(
            metavar="token|sequence|constant",
            rich_help_panel=_HOW,
            help="How the sum over tokens is divided.",
        ),
    ] = "token",
    constant_length: Annotated[
        int | None,
        typer.Option(min=1, help="L of --normalization constant.", rich_help_panel=_HOW),
    ] = None,
    kl_beta: Annotated[
        float,
        typer.Option(
            min=0.0, help="Penalty on the distance to the first weights.", rich_help_panel=_HOW
        ),
    ] = 0.0,
    max_grad_norm: Annotated[
        float,
        typer.Option(min=0.0, help="Longer gradients are cut; 0: never.", rich_help_panel=_HOW),
    ] = 1.0,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Of AdamW, on matrices.", rich_help_panel=_HOW)
    ] = 0.0,
    beta2: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of AdamW.", rich_help_panel=_HOW)
    ] = 0.99,
    truncated: Annotated[
        str,
        typer.Option(
            metavar="keep|mask|drop",
            rich_help_panel=_HOW,
            help="What becomes of completions cut off at max_tokens.",
        ),
    ] = "keep",
    temperature: Annotated[
        float | None,
        typer.Option(help="Of sampling.", show_default="the test's", rich_help_panel=_HOW),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a completion.", show_default="the test's", rich_help_panel=_HOW
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Of the order of rows and of every completion.", rich_help_panel=_RUN),
    ] = 0,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="The same, to evaluate on; repeatable.",
            show_default="held out",
            rich_help_panel=_EVAL,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0, help="Share of the rows, or number of them from 1 on.", rich_help_panel=_EVAL
        ),
    ] = 0.1,
    eval_every: Annotated[
        int,
        typer.Option(
            min=0, help="Steps between evaluations; 0: before and after.", rich_help_panel=_EVAL
        ),
    ] = 25,
    eval_completions: Annotated[
        int,
        typer.Option(min=0, help="Sampled completions per held-out row.", rich_help_panel=_EVAL),
    ] = 8,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_EVAL)
    ] = 25,
    deployment: Annotated[
        str | None,
        typer.Option(
            help="Train on Fireworks: id of the deployment to sample from, made if need be.",
            rich_help_panel=_FIREWORKS,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="accounts/fireworks/models/... to train.",
            show_default="--model",
            rich_help_panel=_FIREWORKS,
        ),
    ] = None,
    training_shape: Annotated[
        str | None, typer.Option(help="Id of the hardware to train on.", rich_help_panel=_FIREWORKS)
    ] = None,
    delete_on_close: Annotated[
        bool,
        typer.Option(
            "--delete-on-close",
            help="Delete trainer job and deployment at the end, if made here. They cost money "
            "while they are there.",
            rich_help_panel=_FIREWORKS,
        ),
    ] = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            "--log",
            metavar="tensorboard|wandb",
            help="Besides metrics.jsonl; repeatable.",
            rich_help_panel=_EVAL,
        ),
    ] = None,
    on_mismatch: Annotated[
        str,
        typer.Option(
            metavar="stop|warn", rich_help_panel=_EVAL, help="When sampler and trainer disagree."
        ),
    ] = "stop",
    on_unscored: Annotated[
        str,
        typer.Option(
            metavar="stop|warn",
            rich_help_panel=_EVAL,
            help="When nothing of an evaluation could be scored.",
        ),
    ] = "stop",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Begin anew, whatever run is there.", rich_help_panel=_RUN
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=_MODEL,
            help="Let the model's folder run its own code.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a policy on what an evaluation test scores, and watch it learn.

    Samples, scores, takes a step, gives the sampler the new weights, again. Stop it in any way: the
    same command goes on from the newest checkpoint.

    \b
    Examples:
      ep-rft train tests/test_math.py::test_math --model local/my-model --steps 200
      ep-rft train tests/test_math.py::test_math --max-staleness 1 --algorithm cispo --steps 200
      ep-rft train tests/test_math.py::test_math --model accounts/fireworks/models/qwen3-8b \\
          --deployment my-run --lora-rank 32 --steps 100
      ep-rft train tests/test_math.py::test_math --model tiny --base-url http://localhost:8000 \\
          --weights ./tiny --steps 50
    """
    with sigterm_interrupts() as stopped:
        try:
            result = run_training(
                evaluator,
                output,
                options={
                    "steps": steps,
                    "epochs": epochs if epochs is not None or steps is not None else 1.0,
                    "groups_per_step": groups_per_step,
                    "completions_per_prompt": n,
                    "max_staleness": max_staleness,
                    "passes": passes,
                    "algorithm": algorithm,
                    "normalization": normalization,
                    "constant_length": constant_length,
                    "kl_beta": kl_beta,
                    "learning_rate": learning_rate,
                    "schedule": schedule,
                    "warmup_steps": warmup_steps,
                    "eval_every": eval_every,
                    "eval_completions": eval_completions,
                    "checkpoint_every": checkpoint_every,
                    "seed": seed,
                    "on_mismatch": on_mismatch,
                    "on_unscored": on_unscored,
                },
                truncated=truncated,
                optimizer={
                    "betas": (0.9, beta2),
                    "weight_decay": weight_decay,
                    "max_grad_norm": max_grad_norm or None,
                },
                completion_params={
                    "api_base": base_url,
                    "temperature": temperature,
                    "max_tokens": max_tokens,
                },
                place={
                    "weights": weights,
                    "lora_rank": lora_rank,
                    "trust_remote_code": trust_remote_code,
                    "deployment": deployment,
                    "base_model": base_model or model,
                    "training_shape": training_shape,
                    "delete_on_close": delete_on_close,
                },
                arguments={
                    "model": model,
                    "data": data or None,
                    "eval_data": eval_data or None,
                    "held_out": held_out,
                    "overwrite": overwrite,
                    "log_to": log_to or [],
                    "progress": not quiet,
                },
            )
        except KeyboardInterrupt:
            same = "The same command" + (" without --overwrite" if overwrite else "")
            say(f"ep-rft: stopped. {same} goes on in {output}", err=True)
            raise typer.Exit(stopped.exit_code) from None
    show_result(result)
