"""Flags made from the options that rooms define, see `eval_protocol_rft._options`.

Invariant: what was not asked for is not handed on, so defaults are those of Python.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from annotated_types import Ge, Le
from rich.markup import escape

from eval_protocol_rft._options import Flag, Option, options_of
from eval_protocol_rft.cli._common import fail, one_line

_EMPTY: Any = inspect.Parameter.empty
_NATIVE = (str, int, float, bool)
_PROGRESS = "progress"
"""An option of Python that is `--quiet` here: without it a command says how far it is."""
_QUIET = Option("quiet", bool, (), False, "No progress.", positional=False)


class path(str):  # noqa: N801 - typer shows the name
    """A path or a URL, as it was typed."""


class Takes(NamedTuple):
    """On a parameter of a command that is a dict: it gets the options of `source` that were asked
    for. A parameter whose type is a settings class needs none, and gets one made of its options."""

    source: Callable[..., Any]
    defaults: Mapping[str, Any] = {}
    """Where the command's are others than Python's. `...` leaves the option out."""
    only: Collection[str] = ()
    """Options, if not all that are flags."""


class Unset(str):
    """A default that is None, and what that means to this command."""


class Setting(NamedTuple):
    """One flag of a command, and where its value goes."""

    option: Option
    parameter: str
    """Of the command."""
    usual: Any = _EMPTY
    """What Python takes without it."""
    make: Callable[..., Any] | None = None
    """What is made of all options of this parameter; None: the parameter is this option."""
    unset: str | None = None
    """What happens without it, where that differs from what the option says."""

    @property
    def flag(self) -> Flag:
        return self.option.flag or Flag()

    @property
    def names(self) -> list[str]:
        """As they are typed; a positional has none."""
        name = self.option.name
        flag_name = ("-" if len(name) == 1 else "--") + name.replace("_", "-")
        if self.option.default is True and not self.flag.only:
            flag_name = flag_name.replace("--", "--no-", 1)
        if self.option.positional:
            return []
        return [*self.flag.names, *(() if self.flag.only else (flag_name,))]

    @property
    def help(self) -> str:
        text = self.option.help
        return f"Do not {text[:1].lower()}{text[1:]}" if self.option.default is True else text

    @property
    def metavar(self) -> str | None:
        """What stands for the value, where that is not its type."""
        positional = self.option.name if self.option.positional else None
        return self.flag.metavar or ("JSON" if _is_json(self.option) else positional)

    @property
    def default_text(self) -> str:
        """What happens without it, in words; empty where nothing does."""
        default = self.option.default
        if default is _EMPTY:
            return "required"
        if default is None or default in ((), [], {}):
            return self.unset or self.flag.unset or ""
        return "" if isinstance(default, bool) else str(default)


def settings_of(command: Callable[..., Any]) -> list[Setting]:
    """All flags of a command: its own, and those of what it takes."""
    settings: list[Setting] = []
    quiet: list[Setting] = []
    for name, parameter in options_of(command).items():
        takes = next((extra for extra in parameter.extras if isinstance(extra, Takes)), None)
        if takes is None and not is_dataclass(parameter.type):
            settings.append(Setting(parameter, name))
            continue
        source, defaults, only = takes or Takes(parameter.type)
        make = parameter.type if takes is None else dict
        for option in options_of(source).values():
            default = defaults.get(option.name, option.default)
            if option.name == _PROGRESS:
                quiet = [Setting(_QUIET, name, _EMPTY, make)]
            elif default is not ... and (option.name in only if only else option.flag):
                words = default if isinstance(default, Unset) else None
                as_flag = option._replace(
                    default=default if words is None else None, positional=False
                )
                settings.append(Setting(as_flag, name, option.default, make, words))
    # What must be given comes first.
    return sorted([*settings, *quiet], key=lambda setting: setting.option.default is not _EMPTY)


def for_typer(command: Callable[..., None], *, wrong: int = 1) -> Callable[..., None]:
    """A function whose signature typer makes `command`'s flags of.

    Args:
        command: what they are for.
        wrong: exit code where the text of a flag is.
    """
    settings = settings_of(command)

    @one_line
    def run(context: typer.Context, **texts: Any) -> None:
        def asked(name: str) -> bool:
            source = context.get_parameter_source(name)
            return source is not None and source.name != "DEFAULT"

        arguments: dict[str, Any] = {}
        taken: dict[str, dict[str, Any]] = {s.parameter: {} for s in settings if s.make}
        for setting in settings:
            option, parameter = setting.option, setting.parameter
            try:
                value = _value(setting, texts[option.name])
            except ValueError as error:
                fail(str(error), code=wrong)
            if setting.make is None:
                arguments[parameter] = value
            elif option is _QUIET:
                taken[parameter][_PROGRESS] = not value
            elif value is not None and (asked(option.name) or value != setting.usual):
                taken[parameter][option.name] = value
        makers = {s.parameter: s.make for s in settings if s.make}
        command(**arguments, **{name: make(**taken[name]) for name, make in makers.items()})

    run.__name__, run.__doc__ = command.__name__, help_text(command)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *map(_parameter, settings)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def help_text(command: Callable[..., Any]) -> str:
    """A command's docstring as its help: flags are listed below it, examples keep their lines,
    paragraphs take those of the terminal."""
    text = re.sub(r"\n\nArgs:\n.*?(?=\n\n|\Z)", "", inspect.getdoc(command) or "", flags=re.DOTALL)
    prose, heading, examples = escape(text).partition("\n\nExamples:\n")
    flowing = re.sub(r"(?<!\n)\n(?!\n)", " ", prose)
    return flowing + heading.replace("\n\n", "\n\n\b\n") + examples


def _parameter(setting: Setting) -> inspect.Parameter:
    """As typer reads it."""
    option, flag, names = setting.option, setting.flag, setting.names
    kind = _typer_type(option)
    shown: dict[str, Any] = {
        "help": escape(setting.help),
        "metavar": setting.metavar,
        "rich_help_panel": flag.panel,
        "envvar": flag.env,
    }
    if kind in (int, float):
        for bound in option.extras:
            if isinstance(bound, Ge | Le):
                name, limit = ("min", bound.ge) if isinstance(bound, Ge) else ("max", bound.le)
                shown[name] = kind(limit)
    default = option.default
    if default is None or default in ((), [], {}):
        default, kind = None, kind | None
        shown["show_default"] = setting.default_text or False
    elif default is True:
        names = [f" /{names[0]}"]
        shown["show_default"] = False
    if _path_of(option.type) is not None:
        shown["parser"] = path
    info: Any = typer.Argument(**shown) if option.positional else typer.Option(*names, **shown)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _typer_type(option: Option) -> Any:
    """What typer is to make of the text."""
    origin, arguments = get_origin(option.type), get_args(option.type)
    if option.flag is not None and option.flag.parse is not None:
        return str
    if option.type in _NATIVE or origin is Literal:
        return option.type
    if isinstance(origin, type) and issubclass(origin, Sequence):
        item = arguments[0]
        kind = path if _path_of(item) else item if item in _NATIVE else str
        return list[kind]  # type: ignore[valid-type]
    return path if _path_of(option.type) else str


def _path_of(kind: Any) -> Literal["file", "file or URL"] | None:
    """What names of files an option takes, if any: a `Path` is of this machine."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _path_of(arguments[0])
    kinds = {get_origin(each) or each for each in (kind, *arguments)}
    if kinds.isdisjoint((Path, os.PathLike)):
        return None
    return "file or URL" if str in kinds else "file"


def _value(setting: Setting, value: Any) -> Any:
    """What Python gets for what typer read.

    Raises:
        ValueError: it is wrong.
    """
    flag, option = setting.flag, setting.option
    if value is None or value == []:
        return None
    try:
        if flag.parse is not None and isinstance(value, str):
            return flag.parse(value)
    except ValueError as error:
        raise ValueError(f"{setting.names[0]} {value}: {error}") from error
    if takes := _path_of(option.type):
        at = functools.partial(_path_at, may_be_url=takes != "file")
        return list(map(at, value)) if isinstance(value, list) else at(value)
    return _json_object(setting.names[0], value) if _is_json(option) else value


def _path_at(text: str, *, may_be_url: bool) -> str | Path:
    if not text:
        raise ValueError("no file is named: the name is empty")
    if "://" not in text and "::" not in text:
        return Path(text)
    from eval_protocol_rft.data import is_url, output_path

    return text if may_be_url and is_url(text) else output_path(text)


def _is_json(option: Option) -> bool:
    origin = get_origin(option.type)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _json_object(name: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a JSON object, got {text}")
    return value
