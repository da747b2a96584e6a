"""One definition of an option: a parameter of a public function, or a field of a settings class.

    groups_per_step: Annotated[int, Ge(1), Flag(panel="How to train")] = 32
    \"\"\"Prompts with a gradient per step.\"\"\"

Its name, type, bounds and default stand in the signature, its help in the docstring: below the
field, or under `Args:`. The command line, the tables in the documentation and the checks of values
given from Python are made from it.

Invariant: nothing here imports what a command does its work with.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

_UNIONS = (Union, type(int | None))


class Flag:
    """Marks an option of Python as one of the command line, where it is `--its-name`.

    Args:
        names: further names there.
        only: `names` are all; there is no `--its-name`.
        panel: heading under which `--help` shows it.
        metavar: what stands for the value.
        unset: what happens without it, where the default is None.
        env: environment variable that it is read from too.
        parse: makes the value of the text; raises ValueError.
    """

    __slots__ = ("env", "metavar", "names", "only", "panel", "parse", "unset")

    def __init__(
        self,
        *names: str,
        only: bool = False,
        panel: str | None = None,
        metavar: str | None = None,
        unset: str | None = None,
        env: str | None = None,
        parse: Callable[[str], Any] | None = None,
    ) -> None:
        self.names, self.only, self.panel = names, only, panel
        self.metavar, self.unset, self.env, self.parse = metavar, unset, env, parse


def environment_variable(name: str) -> str:
    """What the variable `name` holds: the flag of a secret, which no command line should show.

    Raises:
        ValueError: there is none.
    """
    if not os.environ.get(name):
        raise ValueError("there is no such environment variable")
    return os.environ[name]


class Option(NamedTuple):
    """One option, as it is defined."""

    name: str
    type: Any
    """Without None, and without what `Annotated` says."""
    extras: tuple[Any, ...]
    """What `Annotated` says of it."""
    default: Any
    """`inspect.Parameter.empty` where a value must be given."""
    help: str
    positional: bool

    @property
    def flag(self) -> Flag | None:
        """None: of Python alone."""
        return next((extra for extra in self.extras if isinstance(extra, Flag)), None)


def options_of(source: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function or a class by their names, in the order of its signature."""
    texts = _help(source)
    return {
        name: option._replace(help=texts.get(name, ""))
        for name, option in _signature(source).items()
    }


@functools.cache
def _signature(source: Callable[..., Any]) -> dict[str, Option]:
    hints = typing.get_type_hints(
        source, localns=_Names(vars(sys.modules[source.__module__])), include_extras=True
    )
    options = {}
    makers = {
        field.name: field.default_factory
        for field in (dataclasses.fields(source) if dataclasses.is_dataclass(source) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    for name, parameter in inspect.signature(source).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        bare, extras = _split(hints.get(name, Any))
        options[name] = Option(
            name=name,
            type=bare,
            extras=extras,
            default=makers[name]() if name in makers else parameter.default,
            help="",
            positional=parameter.kind is not parameter.KEYWORD_ONLY,
        )
    return options


def check_options(settings: Any, error: type[ValueError] = ValueError) -> None:
    """Check the fields of a settings object against their bounds and choices.

    Raises:
        ValueError: of the type `error`; it names the first that is outside.
    """
    names = _signature(cast("Hashable", type(settings)))
    check_arguments(type(settings), {name: getattr(settings, name) for name in names}, error)


def check_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], error: type[ValueError] = ValueError
) -> None:
    """Check the arguments of a function, its `locals()` at the start, as `check_options` does."""
    for name, option in _signature(cast("Hashable", function)).items():
        value = values[name]
        if value is None:
            continue
        choices = get_args(option.type) if get_origin(option.type) is Literal else ()
        if choices and value not in choices:
            raise error(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if option.type is float and not math.isfinite(value):
            raise error(f"{name} must be finite, got {value}")
        for bound in option.extras:
            if isinstance(bound, Ge) and not value >= bound.ge:
                raise error(f"{name} must be at least {bound.ge}, got {value}")
            if isinstance(bound, Gt) and not value > bound.gt:
                raise error(f"{name} must be above {bound.gt}, got {value}")
            if isinstance(bound, Lt) and not value < bound.lt:
                raise error(f"{name} must be below {bound.lt}, got {value}")
            if isinstance(bound, Le) and not value <= bound.le:
                raise error(f"{name} must be at most {bound.le}, got {value}")


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated` and None, and what `Annotated` says of it."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        bare, more = _split(inner)
        return bare, (*extras, *more)
    if get_origin(hint) in _UNIONS:
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:
            return _split(kinds[0])
        if all(get_origin(kind) is Literal for kind in kinds):
            return Literal[tuple(choice for kind in kinds for choice in get_args(kind))], ()
    return hint, ()


def _help(source: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of each, as one line."""
    import docstring_parser

    if inspect.isclass(source):
        parsed = docstring_parser.parse_from_object(source)
    else:
        style = docstring_parser.DocstringStyle.GOOGLE
        parsed = docstring_parser.parse(source.__doc__ or "", style=style)
    texts = {}
    for described in parsed.params:
        # Further paragraphs are for readers of the code.
        text = " ".join((described.description or "").split("\n\n")[0].split())
        if not inspect.isclass(source):
            text = re.sub(r"^[a-z]+(?=[ ,.;])", lambda word: word[0].title(), text)
        texts.update(dict.fromkeys(map(str.strip, described.arg_name.split(",")), text))
    return texts


class _Unknown:
    """Stands for a type that is imported for type checkers alone. No option is of such a type."""

    def __class_getitem__(cls, item: object) -> type[_Unknown]:
        return cls


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, _Unknown)
