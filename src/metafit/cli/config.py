"""One YAML file in place of options: the same words, held against the command's own parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from typer import Context

from metafit.errors import BadInput, unknown

OF_THE_CALL = ("config", "resume", "as_json")  # parameters that say how a command is called, not what it runs


class _Loader(yaml.SafeLoader):
    """The safe one, to which 1e-3 is a number as it is in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")  # of a database, say: it is written to no file


class Word(NamedTuple):
    """A parameter of a command: its name, its type (and the parts of that, where it is a union), and its range."""

    name: str
    kind: Any
    kinds: tuple[Any, ...]
    least: float | None
    most: float | None
    default: Any


def read(path: Path, context: Context) -> dict[str, Any]:
    """The file's values by the names of the command's parameters, as click's ``default_map`` has them.

    A parameter that takes ``name=value`` many times may be a mapping in the file.

    Raises:
        BadInput: no such file, not YAML, anchors or tags, a word twice, or one that the command does not have, or a
            value of another type or outside its range.
    """
    words = _words(context)
    values = {}
    for word, (value, line) in _load(path).items():
        where = f"{path}, line {line}: "
        if word not in words:
            raise BadInput(f"{where}{unknown('word', word, words)}")
        values[words[word].name] = _checked(where + word, value, words[word])
    return values


def complete(context: Context) -> dict[str, Any]:
    """What the command runs with, by its words, defaults filled in; ``read`` gives the same again."""
    made: dict[str, Any] = {}
    for word, parameter in _words(context).items():
        value = context.params[parameter.name]
        if list[str] in parameter.kinds:
            made[word] = {name: parsed(text) for name, _, text in (item.partition("=") for item in value or [])}
        else:
            made[word] = _PASSWORD.sub(r"\1***@", str(value)) if isinstance(value, (str, Path)) else value
    return made


def parsed(text: str) -> Any:
    """The value of an option of a learner: JSON where it is that, else the text itself.

    >>> parsed("0.1"), parsed("alfa"), parsed("[1, 2]")
    (0.1, 'alfa', [1, 2])
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def _words(context: Context) -> dict[str, Word]:
    """The parameters of the command by their words: the long options without their dashes."""
    hints = get_type_hints(context.command.callback, include_extras=True)
    words = {}
    for parameter in context.command.params:
        name, hint = str(parameter.name), hints[str(parameter.name)]
        kind, *options = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        least, most = (getattr(options[0], bound, None) if options else None for bound in ("min", "max"))
        if name not in OF_THE_CALL:
            word = max(parameter.opts, key=len).lstrip("-")
            words[word] = Word(name, kind, kinds, least, most, parameter.default)
    return words


def _checked(where: str, value: Any, word: Word) -> Any:
    """The value, of the parameter's type and within its range; a mapping as the list of its ``name=value``."""
    if value is None and word.default is not None:  # click would take the default in its place
        raise BadInput(f"{where}: holds nothing; give it a value, or leave it out")
    kind = word.kind | dict[str, JsonValue] if list[str] in word.kinds else word.kind
    strict = not {str, Path} & {*word.kinds}  # 1 is not true, nor is 2.0 a count; where text is asked for, 5 is "5"
    within: Any = Annotated[kind, Field(ge=word.least, le=word.most)]
    try:
        checked = TypeAdapter(within, config=ConfigDict(strict=strict, coerce_numbers_to_str=True)).validate_python(
            value
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input ")
        quotes = "; put it in quotes" if str in word.kinds and not isinstance(value, list | dict) else ""
        raise BadInput(f"{where} {value!r}: {message}{quotes}") from None
    if isinstance(checked, dict):
        return [f"{name}={json.dumps(value)}" for name, value in checked.items()]
    return checked


def _load(path: Path) -> dict[str, tuple[Any, int]]:
    """The words of the file, each with its value and its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"config file {path}: does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, ValueError) else error.strerror
        raise BadInput(f"config file {path}: cannot be read ({reason}); name a YAML file") from None
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise BadInput(
                    f"{path}, line {event.start_mark.line + 1}: anchors, aliases and tags are not read; "
                    "write the value itself"
                )
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except BadInput:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{path}, line {line}: is not YAML: {error.problem}; write one `word: value` a line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character, a date or a depth that cannot be
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise BadInput(f"config file {path}: is not YAML: {reason}; write one `word: value` a line") from None
    if node is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"config file {path}: holds no words with values; write one `word: value` a line")
    _no_word_twice(path, node)
    return {key.value: (values.get(key.value), key.start_mark.line + 1) for key, _ in node.value}


def _no_word_twice(path: Path, node: Any) -> None:
    """In no mapping of the file: YAML itself would take the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _no_word_twice(path, item)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise BadInput(f"{path}, line {line}: {key.value} stands on line {lines[key.value]} too; keep one")
            lines[key.value] = line
            _no_word_twice(path, value)
