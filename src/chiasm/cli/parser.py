"""Makes options of configurations' fields, and reads what a person writes for their values."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import enum
import functools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from chiasm import cores
from chiasm.cli import sources
from chiasm.errors import ConfigurationError
from chiasm.options import NamedOption, Option, flag, options_of

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}
_MAX_SIZE = 1 << 60
"""Bytes."""
_MAX_NUMBER = (1 << 31) - 1
"""What the libraries that get an option's value can hold in any case, and more than any time in seconds."""
_SHOWN_CHARACTERS = 40
_RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_OTHER_SOURCES = (
    "Every option can also be in a YAML file (--config FILE) and in the environment\n(CHIASM_MAX_BODY_BYTES for "
    "--max-body-bytes). The command line counts first,\nthen the environment, then the file."
)
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
_HELP_COLUMN = 32


class Parser(argparse.ArgumentParser):
    """The options of one command. Options that aren't given are not in the result, so the configurations' defaults apply."""

    def __init__(
        self, command: str, arguments: str, description: str, *, add_help: bool = True, has_sources: bool = False
    ) -> None:
        """``has_sources``: every option can also be in a YAML file and in the environment."""
        super().__init__(
            prog=f"chiasm {command}",
            usage=f"chiasm {command} {arguments}",
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=_HELP_COLUMN),
            argument_default=argparse.SUPPRESS,
            add_help=add_help,
            allow_abbrev=False,
            epilog=_OTHER_SOURCES if has_sources else None,
        )
        self._has_sources = has_sources
        self._variables: dict[str, NamedOption] = {}
        self._takes_value: set[str] = set()
        self.options: dict[argparse.Action, NamedOption] = {}
        """The options that take a value, by their actions."""
        if has_sources:
            self.add_option(option("config", Path, "YAML file with options; those given elsewhere count before it."))

    def add(
        self,
        place: str | argparse._ArgumentGroup,
        config: type,
        *,
        only: Collection[str] | None = None,
        without: Collection[str] = (),
        prefix: str = "",
    ) -> None:
        """Add the options of a dataclass to a group of --help, or to a new one with the title ``place``."""
        group = self.add_argument_group(place) if isinstance(place, str) else place
        for named in options_of(config):
            if named.name not in without and (only is None or named.name in only):
                self.add_option(named._replace(name=f"{prefix}{named.name}"), group)

    def add_option(
        self, named: NamedOption, group: argparse._ArgumentGroup | None = None, *, required: bool = False
    ) -> None:
        """Add one option."""
        option, place = named.option, group or self
        text = f"{option.help}{_note(named)}".replace("%", "%%")
        if named.type is bool:
            place.add_argument(named.flag, action="store_true", help=text)
            return
        action = "append" if _is_repeated(named) else "store"
        metavar, read = _metavar(named), _reader(named)
        added = place.add_argument(named.flag, action=action, metavar=metavar, type=read, required=required, help=text)
        self.options[added] = named
        self._takes_value.add(named.flag)
        if option.environment:
            self._variables[named.name] = named

    def add_arguments(self, name: str, text: str, group: argparse._ArgumentGroup | None = None) -> None:
        """Add an option whose value is a tuple of arguments, quoted as for a shell."""
        flag_ = flag(name)
        (group or self).add_argument(flag_, metavar="ARGS", type=parse_arguments, help=text)
        self._takes_value.add(flag_)

    def parse(self, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
        """Return what was given, by name. Raises ConfigurationError for what cannot be understood; ends after --help."""
        needed = [action for action in self._actions if action.required and action.nargs != "*"]
        for action in needed:  # another source may have it
            action.required = False
        try:
            given = vars(self.parse_args(self._joined(arguments)))
        finally:
            for action in needed:
                action.required = True
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        found = self._of_environment(environment) | found
        path = found.pop("config", None) if self._has_sources else None
        found = (self._of_file(path) if path is not None else {}) | found
        if missing := [action for action in needed if action.dest not in found]:
            names = (action.option_strings[0] if action.option_strings else action.metavar for action in missing)
            self.error(f"the following arguments are required: {', '.join(map(str, names))}")
        return found

    def _of_environment(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return what variables give, by name."""
        variables = {name: named.option.environment for name, named in self._variables.items()}
        if self._has_sources:
            others = {name: f"{sources.VARIABLE_PREFIX}{name.upper()}" for name in self._by_name}
            variables = others | variables
        found: dict[str, Any] = {}
        for name, text in sources.of_environment(variables, environment).items():
            try:
                found[name] = sources.value_in_environment(self._by_name[name], text)
            except ValueError as error:
                raise ConfigurationError(f"{variables[name]} in the environment: {error}.") from None
        return found

    def _of_file(self, path: Path) -> dict[str, Any]:
        """Return what the file of ``--config`` gives, by name. Raises ConfigurationError, also for what is no option."""
        found: dict[str, Any] = {}
        for name, value in sources.read_file(path).items():
            action = self._by_name.get(name)
            if action is None or name == "config":
                close = difflib.get_close_matches(name, self._by_name, n=1)
                hint = f"; did you mean {close[0]}?" if close else f". See {self.prog} --help."
                raise ConfigurationError(
                    f"--config: {path}: {self.prog} has no option {name[:_SHOWN_CHARACTERS]!r}{hint}"
                )
            named = self.options.get(action)
            is_json = bool(named and named.option.json)
            join = sources.joined(
                (named.option.separator or ",") if named else ",", is_json=is_json, is_command_line=named is None
            )
            try:
                found[name] = sources.value_in_file(action, value, join, is_json=is_json)
            except ValueError as error:
                raise ConfigurationError(f"--config: {path}: {name}: {error}.") from None
        return found

    @property
    def _by_name(self) -> dict[str, argparse.Action]:
        """All options, and what has no dashes."""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").rstrip(".")
        hint = f" See {self.prog} --help." if self.add_help else ""
        raise ConfigurationError(f"{text[0].upper()}{text[1:]}.{hint}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print --help; argparse would keep silent about what can't be written."""
        print(message, end="", file=file)

    def _joined(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments with each option's value joined to it: argparse takes no value that begins with a dash."""
        joined: list[str] = []
        for argument in arguments:
            if joined and joined[-1] in self._takes_value:
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return joined


def option(name: str, kind: Any, text: str, **details: Any) -> NamedOption:
    """Return an option that is no field of a configuration."""
    return NamedOption(name, name, kind, None, Option(text, **details))


# ---- values ------------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Return the bytes of ``512MiB``, ``512M`` (the same), ``1.5GB`` (decimal) or ``1048576``."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise _wrong(f"{_shown(text)} is not a size; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    size = float(match[1]) * _UNITS[match[2]]
    if size > _MAX_SIZE:
        raise _wrong(f"{_shown(text)} is larger than any memory or disk")
    return int(size)


def show_size(size: int) -> str:
    """Return a size as a person writes it, with the largest unit that divides it."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return the CPUs of ``0,2-3``."""
    try:
        return cores.parse_cpus(text)
    except ConfigurationError as error:
        raise _wrong(error.message.rstrip(".")) from None


def parse_arguments(text: str) -> tuple[str, ...]:
    """Return the arguments of a command line, quoted as for a shell."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise _wrong(f"{_shown(text)} is not a command line: {error}") from None


def _parse_json_list(text: str, *, example: str) -> tuple[str, ...]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return tuple(values)
    raise _wrong(f"{_shown(text)} is not a JSON list of strings; write for example {example}")


def _parse_json_object(text: str, *, example: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise _wrong(f"{_shown(text)} is not a JSON object; write for example {example}")


def _wrong(message: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(message)


def _parse_choice(text: str, *, choices: tuple[str, ...], kind: Callable[[str], Any]) -> Any:
    if text.lower() not in choices:
        raise _wrong(f"{_shown(text)} is not one of {', '.join(choices)}")
    return kind(text.lower())


def _parse_list(text: str, *, separator: str) -> tuple[str, ...]:
    values = tuple(value.strip() for value in text.split(separator))
    if not all(values):
        raise _wrong(f"{_shown(text)} is not a list; write for example {separator.join('01')}")
    return values


def _parse_number(text: str, *, kind: Callable[[str], float], low: float, high: float) -> float:
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value <= high and math.isfinite(value):
            return value
        if value > high == _MAX_NUMBER:
            raise _wrong(f"{_shown(text)} is more than the limit of {high:.10g}")
    bounds = (
        "" if low <= -_MAX_NUMBER else f" of at least {low:g}" if high >= _MAX_NUMBER else f" from {low:g} to {high:g}"
    )
    raise _wrong(f"{_shown(text)} is not {'an integer' if kind is int else 'a number'}{bounds}")


def _parse_path(text: str) -> Path:
    if not text:  # it would be the folder that one is in
        raise _wrong("the path is empty; give one, or leave the option out")
    return Path(text)


def _parse_range(text: str) -> tuple[int, int]:
    """Return the ends of ``1..4``; both ends of ``3`` are 3."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise _wrong(f"{_shown(text)} is neither an integer of at least 0 nor a range of them, such as 1..4")
    low, high = (int(_parse_number(end, kind=int, low=0, high=_MAX_NUMBER)) for end in (match[1], match[2] or match[1]))
    if low > high:
        raise _wrong(f"{_shown(text)} is no range, since it ends before it begins; write {high}..{low}")
    return low, high


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]!r}…"


def _reader(named: NamedOption) -> Callable[[str], Any]:
    """Return what makes a value of the text that a person writes."""
    kind, option = named.type, named.option
    if values := choices(named):
        return functools.partial(_parse_choice, choices=values, kind=kind)
    if option.json:
        parse = _parse_json_list if kind == tuple[str, ...] else _parse_json_object
        return functools.partial(parse, example=option.json)
    if option.separator:
        return functools.partial(_parse_list, separator=option.separator)
    if kind == tuple[int, ...]:
        return parse_cpus
    if kind == tuple[int, int]:
        return _parse_range
    if kind is int and named.name.endswith("_bytes"):
        return parse_size
    if kind in (int, float):
        low = -_MAX_NUMBER if option.min is None else option.min
        high = _MAX_NUMBER if option.max is None else option.max
        return functools.partial(_parse_number, kind=kind, low=low, high=high)
    return _parse_path if kind is Path else str


def _is_repeated(named: NamedOption) -> bool:
    return named.type == tuple[str, ...] and not (named.option.separator or named.option.json)


def choices(named: NamedOption) -> tuple[str, ...]:
    """Return the only values that an option takes; empty if there are others."""
    if isinstance(named.type, type) and issubclass(named.type, enum.StrEnum):
        return tuple(named.type)
    return named.option.choices


def _metavar(named: NamedOption) -> str:
    if named.option.metavar:
        return named.option.metavar
    if values := choices(named):
        return "|".join(values)
    if named.option.json:
        return "LIST" if named.type == tuple[str, ...] else "JSON"
    unit = named.name.rpartition("_")[2]
    return {"bytes": "SIZE", "seconds": "SECONDS"}.get(unit) or _METAVARS.get(named.type, "TEXT")


def _note(named: NamedOption) -> str:
    """Return what --help shows behind the text: an example of JSON, the default, and the variable of the environment."""
    default, notes = named.default, []
    if default in (None, (), ""):
        notes += [f"default: {named.option.unset}"] if named.option.unset else []
    elif named.type is not bool:
        notes.append(f"default: {show_size(default) if named.name.endswith('_bytes') else _plain(default)}")
    if named.option.environment:
        notes.append(f"environment: {named.option.environment}")
    example = f" For example {named.option.json}." if named.option.json else ""
    return example + (f" [{'; '.join(notes)}]" if notes else "")


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
