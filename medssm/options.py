"""A function's signature and docstring as a command line and a configuration file.

What a user can set is written once, in the function that does the work; `read` turns a command line into its arguments.

- A required argument is positional, any other one an option: `max_steps` is `--max-steps`. A `bool` is `--resume` and `--no-resume`.
  A positional-only argument with a default is an optional word; `*words` takes the words that are left.
- Each argument may also be given by its name (`--out run`) and in a YAML file (`--config file.yaml`).
- The annotation is the type: a `Sequence[int]` takes several words, a `Literal` gives the choices. What no text can give, such as a module,
  is left out: a part of a union, or the whole argument.
- The docstring's first paragraph is the description. Its sections `Args: Title` are the groups of the help:

      Args: Data
          dataset: a folder with dataset.json
          fold: the part of the cases to hold out
"""

from __future__ import annotations

import argparse
import collections.abc
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import jsonargparse
import yaml

from medssm.errors import UserError

DEFAULT, COMMAND_LINE = "default", "command line"
_EXPECTED = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false", dict: "a mapping in JSON or YAML"}
_METAVARS = {int: "N", float: "X", bool: "", Path: "PATH", dict: "JSON"}
_PLAIN = (int, float, str, bool, Path, dict, list, type(None))


@dataclass(frozen=True)
class Option:
    """What an annotation cannot say of an option, as in `Annotated[str, Option(flag="--csv")]`.

    Args:
        flag: the name on the command line, where it is not the argument's own
        short: one letter that stands for it, as "-o"
        choices: the allowed words, where a table has them
        alone: the value where no word follows the option
        repeat: one word each time that the option is given, and all of them are kept
        several: of a positional argument that may be a sequence: it takes all words that the other ones leave
    """

    flag: str | None = None
    short: str | None = None
    choices: Iterable[str] | None = None
    alone: str | None = None
    repeat: bool = False
    several: bool = False


@dataclass(frozen=True)
class Given:
    """A command line that was read.

    Args:
        values: the function's arguments by name, those that keep their default included
        words: what the function's `*words` gets
        sources: where each argument comes from: DEFAULT, COMMAND_LINE or the path of a file
        flags: which of `json`, `quiet` and `print_config` are on
    """

    values: dict[str, Any]
    words: tuple[str, ...]
    sources: dict[str, str]
    flags: frozenset[str]

    def call(self, function: Callable[..., Any]) -> Any:
        """`function` with these arguments; one that has `quiet` is told whether it is on."""
        parameters, named, positional = inspect.signature(function).parameters, dict(self.values), []
        for name, parameter in parameters.items():
            if name in named and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                positional.append(named.pop(name))
        if "quiet" in parameters:
            named["quiet"] = "quiet" in self.flags
        return function(*positional, *self.words, **named)


@dataclass(frozen=True)
class _Argument:
    """An argument of a function as the command line has it; `rest` marks `*words`."""

    name: str
    kind: Any  # a type that jsonargparse checks
    default: Any
    positional: bool
    rest: bool
    option: Option
    group: str
    text: str

    @property
    def flag(self) -> str:
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty and not self.rest

    @property
    def shown(self) -> str:
        """The name in a message."""
        return self.name if self.positional else self.flag

    @property
    def items(self) -> tuple[Any, int | None] | None:
        """The type of a sequence's items, and their number where it is fixed; None for what is no sequence."""
        kinds = [kind for kind in _union(self.kind) if kind is not type(None)]
        origin, inner = typing.get_origin(kinds[0]), typing.get_args(kinds[0])
        if len(kinds) > 1 or origin not in (list, tuple):
            return None
        return inner[0], None if origin is list or inner[-1] is ... else len(inner)

    @property
    def expected(self) -> str:
        """What a value is, in words."""
        if self.items:
            kind, count = self.items
            return f"{count or 'one or more'} values, each {_expected(kind)}"
        return _expected(self.kind)


def _common(name: str, kind: Any, text: str) -> _Argument:
    option = Option(repeat=name == "config", short="-h" if name == "help" else None)
    return _Argument(name, kind, None, False, False, option, "Configuration and output", text)


_COMMON = (
    _common("config", list[Path], "a YAML file of options; of several the last one wins, and a word on the command line wins over all"),
    _common("print_config", bool, "print every option as YAML with where its value comes from, and stop"),
    _common("json", bool, "print the result as JSON"),
    _common("quiet", bool, "no progress bar, no summary"),
    _common("help", bool, "show this text"),
)


def read(function: Callable[..., Any], prog: str, words: Sequence[str]) -> Given:
    """The arguments of `function` from the words of a command line and the files it names.

    Raises UserError with one line that names the option, what was expected and what came; SystemExit(0) after --help.
    """
    summary, arguments = _described(function)
    texts, free = _split(words, [*arguments, *_COMMON])
    parser = _parser(arguments, prog, summary)
    if "help" in texts:
        parser.print_help()
        raise SystemExit(0)
    open_places = [a for a in arguments if a.positional and not a.rest and a.name not in texts]
    left = free
    for after, argument in zip(reversed(range(len(open_places))), open_places, strict=True):
        count = max(1, len(left) - after) if argument.option.several else 1
        if left:
            texts[argument.name], left = left[:count], left[count:]
    if left and not any(a.rest for a in arguments):
        raise UserError(f"expected {_usage(arguments) or 'options alone'}, got one more word: {left[0]!r}")

    values = {a.name: a.default for a in arguments if not a.rest}
    sources = dict.fromkeys(values, DEFAULT)
    for word in texts.pop("config", []):
        found = _typed(_load(word, arguments, prog), arguments, parser, f"{word}: ")
        values |= found
        sources |= dict.fromkeys(found, word)
    flags = frozenset(a.name for a in _COMMON if texts.pop(a.name, [False])[0])
    found = _typed({a.name: texts[a.name] if a.items else texts[a.name][-1] for a in arguments if a.name in texts}, arguments, parser)
    values |= found
    sources |= dict.fromkeys(found, COMMAND_LINE)
    missing = [a.shown for a in arguments if a.required and values[a.name] is a.default]
    if missing and "print_config" not in flags:
        raise UserError(f"{', '.join(missing)}: expected a value on the command line or in a file (--config), got none")
    return Given({name: value for name, value in values.items() if value is not inspect.Parameter.empty}, tuple(left), sources, flags)


def text_of(argument: str, functions: Sequence[Callable[..., Any]], words: Sequence[str]) -> str | None:
    """What a command line gives for an argument before it is known which of `functions` is called; else what the last of its files gives.

    None where it gives nothing. Raises UserError for an option that none of the functions has.
    """
    arguments = {a.flag: a for function in reversed(functions) for a in _described(function)[1]}
    texts, free = _split(words, [*arguments.values(), *_COMMON])
    places = [a.name for a in _described(functions[0])[1] if a.positional and a.name not in texts]
    if argument in texts:
        return str(texts[argument][-1])
    if argument in places[: len(free)]:
        return free[places.index(argument)]
    for path in reversed(texts.get("config", [])):
        if argument in (table := _table(path)):
            return str(table[argument])
    return None


def as_yaml(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Arguments as a file that --config takes; with `sources`, where each value comes from as a comment beside it."""
    lines = []
    for name, value in values.items():
        text = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()
        lines.append(f"{name}: {text}" if sources is None else f"{f'{name}: {text}':<40}  # {sources[name]}")
    return "\n".join(lines) + "\n"


def _described(function: Callable[..., Any]) -> tuple[str, list[_Argument]]:
    """The docstring's first paragraph and the arguments that text can give; `quiet` is every command's."""
    summary, groups = _documented(function)
    hints, arguments = typing.get_type_hints(function, include_extras=True), []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, option = hints[name], Option()
        if typing.get_origin(kind) is typing.Annotated:
            kind, option = typing.get_args(kind)[:2]
        kind = _kind(kind)
        if kind is None or name == "quiet":
            continue
        if option.choices is not None:
            choices = Literal[tuple(option.choices)]  # type: ignore[valid-type]
            kind = list[choices] if typing.get_origin(kind) is list else choices  # type: ignore[valid-type]
        if option.several:
            kind = next(part for part in _union(kind) if typing.get_origin(part) is list)
        rest, required = parameter.kind is parameter.VAR_POSITIONAL, parameter.default is parameter.empty
        positional = rest or parameter.kind is parameter.POSITIONAL_ONLY or (required and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        group, text = groups.get(name, ("Options", ""))
        arguments.append(_Argument(name, kind, parameter.default, positional, rest, option, group, text))
    return summary, arguments


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, tuple[str, str]]]:
    """The first paragraph of a docstring, and {argument: (title of its section, text)}."""
    doc = inspect.getdoc(function) or ""
    found: dict[str, tuple[str, str]] = {}
    title = name = None
    for line in doc.splitlines():
        if section := re.fullmatch(r"Args:(?: (.+))?", line):
            title, name = section.group(1) or "Options", None
        elif line and not line.startswith(" "):
            title = None
        elif title and (entry := re.fullmatch(r" {4}(\w+): (.+)", line)):
            name = entry.group(1)
            found[name] = title, entry.group(2)
        elif title and name and line:
            found[name] = title, f"{found[name][1]} {line.strip()}"
    return " ".join(doc.partition("\n\n")[0].split()), found


def _split(words: Sequence[str], arguments: Sequence[_Argument]) -> tuple[dict[str, list[Any]], list[str]]:
    """{argument: what follows its option}, and the words that belong to no option."""
    flags = {argument.flag: argument for argument in arguments if not argument.rest}
    off = {f"--no-{a.flag[2:]}": a for a in arguments if a.kind is bool and a not in _COMMON}
    known = flags | off | {a.option.short: a for a in arguments if a.option.short}
    texts: dict[str, list[Any]] = {}
    free: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            return texts, free + queue
        if not _is_flag(word):
            free.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in known:
            raise UserError(f"{flag}: no such option{_suggestion(flag, known)}")
        argument = known[flag]
        if argument.kind is bool:
            if equals:
                raise UserError(f"{flag}: expected no value, got {value!r}")
            texts[argument.name] = [flag not in off]
            continue
        most = 1 if argument.items is None or argument.option.repeat else argument.items[1] or len(queue)
        given: list[str | None] = [value] if equals else []
        while not equals and queue and len(given) < most and not _is_flag(queue[0]):
            given.append(queue.pop(0))
        if not given and argument.option.alone is None:
            raise UserError(f"{flag}: expected {argument.expected}, got none")
        before = texts.get(argument.name, []) if argument.option.repeat else []
        texts[argument.name] = [*before, *(given or [argument.option.alone])]
    return texts, free


def _is_flag(word: str) -> bool:
    return re.match(r"-(-?[A-Za-z])", word) is not None


def _parser(arguments: Sequence[_Argument], prog: str, summary: str) -> jsonargparse.ArgumentParser:
    """What checks the values' types and writes the help."""
    usage = " ".join(filter(None, (prog, _usage(arguments), "[options]")))
    parser = jsonargparse.ArgumentParser(prog=prog, usage=usage, description=summary, formatter_class=_Help, exit_on_error=False, add_help=False)
    groups: dict[str, Any] = {}
    names = {argument.name: _invocation(argument) for argument in (*arguments, *_COMMON)}
    for argument in (*arguments, *_COMMON):
        if argument.group not in groups:
            groups[argument.group] = parser.add_argument_group(argument.group)
        kind, count = argument.items or (argument.kind, None)
        text = re.sub(r"`(\w+)`", lambda match: names.get(match.group(1), match.group()), argument.text)
        text = " ".join(filter(None, (text, _default(argument.default)))).replace("%", "%%")
        added = groups[argument.group].add_argument(
            argument.flag, dest=argument.name, type=kind, nargs=(count or "+") if argument.items else None, help=text, default=None
        )
        added.shown = names[argument.name] if argument.positional else f"{names[argument.name]} {_values(argument)}".strip()
    return parser


class _Help(argparse.HelpFormatter):
    """argparse's, with the names that `_parser` wrote."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return str(getattr(action, "shown", None) or super()._format_action_invocation(action))


def _invocation(argument: _Argument) -> str:
    if argument.rest or argument.option.several:
        return f"{argument.name.upper()}..."
    if argument.positional:
        return argument.name.upper()
    flags = [*filter(None, [argument.option.short]), argument.flag, *([f"--no-{argument.flag[2:]}"] if argument.default is True else [])]
    return ", ".join(flags)


def _usage(arguments: Sequence[_Argument]) -> str:
    words = [_invocation(a) if a.required else f"[{_invocation(a)}]" for a in arguments if a.positional]
    return " ".join([*words, *(f"{a.flag} {_values(a)}" for a in arguments if a.required and not a.positional)])


def _values(argument: _Argument) -> str:
    """What follows an option, for the help."""
    kind, count = argument.items or (argument.kind, 1)
    parts = [part for part in _union(kind) if part is not type(None)]
    name = f"{{{','.join(map(str, typing.get_args(kind)))}}}" if typing.get_origin(kind) is Literal else _METAVARS.get(parts[0], "TEXT")
    if argument.option.alone:
        return f"[{name}]"
    return name if argument.option.repeat else " ".join([name] * count) if count else f"{name} [{name} ...]"


def _default(value: Any) -> str:
    if value is None or value is False or value is inspect.Parameter.empty or value in ("", (), [], {}):
        return ""
    if isinstance(value, float):
        value = f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return f"(default: {'on' if value is True else value})"


def _typed(table: Mapping[str, Any], arguments: Sequence[_Argument], parser: jsonargparse.ArgumentParser, where: str = "") -> dict[str, Any]:
    """Texts, or a file's values, as the types that the arguments have; `where` begins the line of an error."""
    result: dict[str, Any] = {}
    for argument in (a for a in arguments if a.name in table):
        value = table[argument.name]
        if value is None:  # jsonargparse takes null for any type
            if type(None) not in _union(argument.kind):
                raise UserError(f"{where}{argument.shown}: expected {argument.expected}, got null")
            result[argument.name] = None
            continue
        if argument.items and not isinstance(value, list):
            value = [value]
        if argument.items and argument.items[1] not in (None, len(value)):
            raise UserError(f"{where}{argument.shown}: expected {argument.expected}, got {len(value)}")
        try:
            result[argument.name] = parser.parse_object({argument.name: value}, defaults=False)[argument.name]
        except argparse.ArgumentError as error:
            named = re.search(r"(?:Given value: |Got value: )(.*)", str(error).splitlines()[-1])  # of a list the item that is wrong
            raise UserError(f"{where}{argument.shown}: expected {argument.expected}, got {named.group(1) if named else value!r}") from error
    return result


def _load(path: str, arguments: Sequence[_Argument], prog: str) -> dict[str, Any]:
    """The table of a configuration file, with keys that are options of the command."""
    table = _table(path)
    names = [a.name for a in arguments if not a.rest]
    for key in table:
        if key not in names:
            raise UserError(f"{path}: {key}: no such option of {prog}{_suggestion(str(key), names)}")
    return table


def _table(path: str) -> dict[str, Any]:
    """What a configuration file holds."""
    try:
        table = jsonargparse.get_loader("yaml")(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config: {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(table, dict):
        raise UserError(f"--config: {path}: expected a mapping of options, got {type(table).__name__}")
    return table


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f", did you mean {close[0]}?" if close else ""


def _kind(annotation: Any) -> Any:
    """The annotation as jsonargparse checks it, without what text cannot give; None where nothing is left."""
    origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if annotation in _PLAIN or origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in map(_kind, inner) if kind is not None]
        kinds.sort(key=lambda kind: kind is str)  # any text is a str: the last one to try
        return None if set(kinds) <= {type(None)} else Union[tuple(kinds)]  # noqa: UP007
    if origin is collections.abc.Mapping or origin is dict:
        return dict if not inner or inner[1] is Any else dict[inner[0], inner[1]]  # type: ignore[valid-type]
    if origin is collections.abc.Sequence or origin is list:
        return list[_kind(inner[0])] if inner else list  # type: ignore[misc]
    if origin is tuple:
        return annotation
    return None


def _union(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _expected(kind: Any) -> str:
    parts = [part for part in _union(kind) if part is not type(None) and not (part is str and Path in _union(kind))]
    words = []
    for part in parts:
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is Literal:
            words.append(f"one of {', '.join(map(str, inner))}")
        elif origin in (list, tuple):
            words.append(f"a list, each {_expected(inner[0])}")
        else:
            words.append(_EXPECTED.get(origin or part, str(part)))
    return " or ".join(words)


def _plain(value: Any) -> Any:
    """A value in the types that YAML has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
