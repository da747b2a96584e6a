"""What a run will take, from what a small one took: completions, tokens, seconds and dollars.

Invariant: pure, and every number is in sight. Each line of a plan says its arithmetic in the
numbers that it was made of: those of the dry run, of the run's size, and of prices and throughputs
that the user gave. There is no price and no throughput in here. A line whose numbers are not all
there is left out, and named with the options that it lacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import msgspec
from annotated_types import Ge, Gt

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.loop._measured import Measured, PlanError, Spread

SIZE = partial(Flag, panel="The run")
RATE = partial(Flag, panel="Prices and throughputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """How large the run is to be."""

    rows: Annotated[int | None, Ge(1), SIZE()] = None
    """Rows of the data set; with --epochs."""
    epochs: Annotated[float | None, Gt(0), SIZE(unset="1 with --rows")] = None
    """Passes over the rows."""
    steps: Annotated[int | None, Ge(1), SIZE()] = None
    """Steps, in the place of --rows and --epochs."""
    groups_per_step: Annotated[int, Ge(1), SIZE()] = 32
    """Prompts of each step."""
    n: Annotated[int | None, Ge(1), SIZE("-n", only=True, unset="the dry run's")] = None
    """Completions per prompt."""
    every_prompt: Annotated[bool, SIZE()] = False
    """A prompt without a gradient uses up its place in a step, as in recipes; `ep-rft train` takes
    another one for it."""
    overlap: Annotated[bool, SIZE()] = False
    """Sampling runs ahead of training (--max-staleness above 0), and the slower of them counts."""
    parameters: Annotated[float | None, Gt(0), SIZE("--billions", only=True)] = None
    """Size of the model, in billions of parameters (those that a token uses)."""

    def __post_init__(self) -> None:
        check_options(self, PlanError)
        if (self.steps is None) == (self.rows is None):
            raise PlanError("how large is the run to be: --steps, or --rows (with --epochs)?")
        if self.epochs is not None and self.rows is None:
            raise PlanError("--epochs: of how many --rows?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Prices and throughputs. None has a default: they are of a service, a model and a day."""

    price_in: Annotated[float | None, Ge(0), RATE(metavar="USD")] = None
    """Per million prompt tokens."""
    price_out: Annotated[float | None, Ge(0), RATE(metavar="USD")] = None
    """Per million sampled tokens."""
    price_trained: Annotated[float | None, Ge(0), RATE(metavar="USD")] = None
    """Per million tokens trained on."""
    gpu_price: Annotated[float | None, Ge(0), RATE(metavar="USD")] = None
    """Per GPU and hour."""
    sampling_gpus: Annotated[int | None, Ge(0), RATE()] = None
    """GPUs of the deployment, paid for by the hour."""
    training_gpus: Annotated[int | None, Ge(0), RATE()] = None
    """GPUs of the trainer, paid for by the hour."""
    tokens_per_second: Annotated[float | None, Gt(0), RATE()] = None
    """Sampled tokens of all requests in flight together."""
    step_seconds: Annotated[float | None, Ge(0), RATE("--seconds-per-step", only=True)] = None
    """Of the trainer."""
    tflops: Annotated[float | None, Gt(0), RATE()] = None
    """TFLOP/s that training reaches on a GPU: with --billions and --training-gpus in the place of
    --seconds-per-step."""
    sync_seconds: Annotated[float | None, Ge(0), RATE("--sync-seconds", only=True)] = None
    """Until the deployment has a step's weights."""
    setup_minutes: Annotated[float | None, Ge(0), RATE()] = None
    """Until trainer and deployment are there."""

    def __post_init__(self) -> None:
        check_options(self, PlanError)


Unit = Literal["", "tokens", "s", "h", "USD", "GPU h"]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One number of a plan."""

    name: str
    arithmetic: str
    value: float
    unit: Unit = ""
    note: str = ""
    """Of what is known of a number in it."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run will take."""

    measured: Measured
    lines: list[Line]
    left_out: dict[str, list[str]]
    """What could not be said -> the options that it lacks, or the lines."""

    def value(self, name: str) -> float | None:
        """That of a line; None where it is left out."""
        return next((line.value for line in self.lines if line.name == name), None)


def number(value: float) -> str:
    """As arithmetic shows it: whole numbers whole, others to five digits that count."""
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.5g}"
    return f"{value:.9f}".rstrip("0") if "e-" in text else text


class _Lines:
    """Gathers lines; what lacks a number is left out."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.left_out: dict[str, list[str]] = {}

    def add(
        self, name: str, arithmetic: str, value: float, unit: Unit = "", *, note: str = ""
    ) -> float:
        self.lines.append(Line(name=name, arithmetic=arithmetic, value=value, unit=unit, note=note))
        return value


def plan(measured: Measured, size: RunSize, rates: Rates) -> Plan:
    """What a run of `size` takes, where each completion is as those of `measured`.

    Raises:
        PlanError: no prompt of the dry run has a gradient, so no step would be filled.
    """
    table = _Lines()
    completions, steps, per_step = _completions(table, measured, size)
    tokens_in = _tokens(table, "prompt tokens", completions, measured.tokens_in)
    tokens_out = _tokens(table, "sampled tokens", completions, measured.tokens_out)
    assert tokens_out is not None  # noqa: S101 - every measurement has it
    in_steps = steps * size.groups_per_step * per_step
    trained = _tokens(
        table,
        "trained tokens",
        in_steps,
        measured.tokens_trained,
        of=f"{number(steps)} steps x {number(size.groups_per_step)} x {number(per_step)} x",
    )
    hours = _seconds(table, size, rates, steps, tokens_out, trained)
    _dollars(table, rates, tokens_in, tokens_out, trained, hours)
    return Plan(measured=measured, lines=table.lines, left_out=table.left_out)


def _completions(table: _Lines, measured: Measured, size: RunSize) -> tuple[int, int, int]:
    """Completions in all, steps, completions per prompt."""
    each = size.groups_per_step
    if size.rows is not None:
        epochs = size.epochs or 1
        steps = math.ceil(epochs * size.rows / each)
        table.add(
            "steps",
            f"{number(epochs)} epochs x {number(size.rows)} rows / {number(each)} a step, upwards",
            steps,
        )
    else:
        assert size.steps is not None  # noqa: S101 - as RunSize checks
        steps = size.steps
        table.add("steps", "as given", steps)
    prompts = steps * each
    arithmetic = f"{number(steps)} steps x {number(each)}"
    if not size.every_prompt and measured.compared:
        if not measured.with_gradient:
            raise PlanError(
                f"{measured.source}: all completions of a prompt are scored alike, for each of "
                f"{measured.compared} prompts: no step would be filled. Sample more completions "
                "per prompt, or prompts of another difficulty; or plan with --every-prompt"
            )
        arithmetic += (
            f" / ({number(measured.with_gradient)} / {number(measured.compared)}), upwards"
        )
        prompts = math.ceil(prompts * measured.compared / measured.with_gradient)
        known = measured.with_gradient / measured.compared
        error = math.sqrt(known * (1 - known) / measured.compared)
        note = f"share of prompts with a gradient: {number(known)} +- {number(error)}"
    else:
        note = "" if size.every_prompt else "not scored, so as if every prompt had a gradient"
    table.add("prompts", arithmetic, prompts, note=note)
    own = (measured.completions + measured.failed) / max(measured.prompts, 1)
    per_step = size.n or max(1, round(own))
    completions = prompts * per_step
    table.add("completions", f"{number(prompts)} prompts x {number(per_step)}", completions)
    return completions, steps, per_step


def _tokens(
    table: _Lines,
    name: str,
    completions: float,
    spread: Spread | None,
    *,
    of: str | None = None,
) -> float | None:
    if spread is None:
        table.left_out[name] = ["a dry run, or a rollout file: this one does not tell them"]
        return None
    known = [
        f"{name} {number(value)}"
        for name, value in (("+-", spread.error), ("deviation", spread.deviation))
        if value is not None
    ]
    return table.add(
        name,
        f"{of or f'{number(completions)} x'} {number(spread.mean)}",
        completions * spread.mean,
        "tokens",
        note=f"mean per completion {', '.join(known)}" if known else "",
    )


FLOP_PER_TOKEN = 6
"""Per parameter: 2 forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361)."""


def _seconds(
    table: _Lines,
    size: RunSize,
    rates: Rates,
    steps: int,
    tokens_out: float,
    trained: float | None,
) -> float | None:
    """Hours of wall-clock."""
    sampling = training = None
    if rates.tokens_per_second is None:
        table.left_out["sampling a step"] = ["--tokens-per-second"]
    else:
        sampling = table.add(
            "sampling a step",
            f"{number(tokens_out)} tokens / {number(steps)} steps / "
            f"{number(rates.tokens_per_second)} tokens/s",
            tokens_out / steps / rates.tokens_per_second,
            "s",
        )
    if rates.step_seconds is not None:
        training = table.add("training a step", "as given", rates.step_seconds, "s")
    elif size.parameters and rates.tflops and rates.training_gpus and trained is not None:
        training = table.add(
            "training a step",
            f"{FLOP_PER_TOKEN} FLOP x {number(size.parameters)}e9 parameters x {number(trained)} "
            f"tokens / {number(steps)} steps / ({number(rates.tflops)}e12 FLOP/s x "
            f"{number(rates.training_gpus)} GPUs)",
            FLOP_PER_TOKEN
            * size.parameters
            * 1e9
            * trained
            / steps
            / (rates.tflops * 1e12 * rates.training_gpus),
            "s",
        )
    else:
        other = "all of --billions, --tflops and --training-gpus, and the trained tokens"
        table.left_out["training a step"] = [f"--seconds-per-step (or {other})"]
    if sampling is None or training is None:
        table.left_out["wall-clock"] = ["seconds of sampling and of training a step"]
        return None
    if rates.sync_seconds is None:
        table.left_out["weights to the deployment, a step"] = ["--sync-seconds"]
    if rates.setup_minutes is None:
        table.left_out["start of trainer and deployment"] = ["--setup-minutes"]
    sync, setup = rates.sync_seconds or 0.0, 60 * (rates.setup_minutes or 0.0)
    after = f"{number(training)} + {number(sync)}" if sync else number(training)
    if size.overlap:
        step, shown = max(sampling, training + sync), f"max({number(sampling)}, {after})"
    else:
        step, shown = sampling + training + sync, f"({number(sampling)} + {after})"
    first = f"{number(setup)} s + " if setup else ""
    return table.add(
        "wall-clock",
        f"({first}{number(steps)} steps x {shown} s) / 3,600",
        (setup + steps * step) / 3600,
        "h",
    )


def _dollars(
    table: _Lines,
    rates: Rates,
    tokens_in: float | None,
    tokens_out: float,
    trained: float | None,
    hours: float | None,
) -> None:
    costs: list[float] = []
    for what, option, tokens, price in (
        ("prompt tokens", "--price-in", tokens_in, rates.price_in),
        ("sampled tokens", "--price-out", tokens_out, rates.price_out),
        ("trained tokens", "--price-trained", trained, rates.price_trained),
    ):
        name = f"cost of {what}"
        if price is None or tokens is None:
            table.left_out[name] = [option] if price is None else [what]
            continue
        arithmetic = f"{number(tokens)} / 1e6 x {number(price)} USD"
        costs.append(table.add(name, arithmetic, tokens / 1e6 * price, "USD"))
    for what, option, gpus in (
        ("deployment", "--sampling-gpus", rates.sampling_gpus),
        ("trainer", "--training-gpus", rates.training_gpus),
    ):
        name = f"cost of the {what}'s GPUs"
        lacking = [o for o, v in ((option, gpus), ("--gpu-price", rates.gpu_price)) if v is None]
        lacking += ["wall-clock"] if hours is None else []
        if lacking:
            table.left_out[name] = lacking
            continue
        price = rates.gpu_price
        assert gpus is not None  # noqa: S101 - as `lacking` says, and the next two
        assert hours is not None  # noqa: S101
        assert price is not None  # noqa: S101
        arithmetic = f"{number(hours)} h x {number(gpus)} GPUs x {number(price)} USD"
        costs.append(table.add(name, arithmetic, hours * gpus * price, "USD"))
    if costs:
        shown = " + ".join(f"{cost:,.2f}" for cost in costs)
        table.add("cost", shown, sum(costs), "USD")
    else:
        table.left_out["cost"] = ["a price"]
