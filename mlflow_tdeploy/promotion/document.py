"""A YAML document that knows on which line everything stands, so that an error can say where to look."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, first_line

#: A path in a document: keys of mappings and places in lists.
Where = tuple[str | int, ...]
#: A value from the environment, for secrets and what differs from host to host.
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Document:
    """What a YAML file says.

    Attributes:
        name: What to call the file in messages.
        content: What it says, with variables of the environment in place of ``${NAME}``.
        lines: The line of each key and each item of a list, from 1 on.
    """

    name: str
    content: Any
    lines: Mapping[Where, int]

    def error(self, where: Where, why: str) -> InvalidInputError:
        """Return an error that says where in the file something is wrong, and what."""
        known = next((where[:size] for size in range(len(where), -1, -1) if where[:size] in self.lines), ())
        line = self.lines.get(known, 1)
        return InvalidInputError(f"{self.name}, line {line}, {shown_path(where)}: {why}")


def read(path: Path, environ: Mapping[str, str] = os.environ) -> Document:
    """Read a YAML file.

    Args:
        path: The file.
        environ: Environment variables, for ``${NAME}`` within texts.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is no YAML, has a key twice, or names a variable that is not set.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"There is no file '{path}'.") from None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"'{path}' cannot be read: {first_line(error)}") from error
    return parse(text, str(path), environ)


def parse(text: str, name: str, environ: Mapping[str, str] = os.environ) -> Document:
    """Read YAML from a text, see :func:`read`."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_loops(name, node, ())
        lines = dict(_lines(node, ())) if node is not None else {}
        document = Document(name, None, lines)
        _refuse_twice(document, node, ())
        content = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidInputError(f"{name}, line {line}: this is no YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character, a date that is none, too deep
        raise InvalidInputError(f"{name}: this is no YAML: {first_line(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(name, _with_variables(document, content, (), environ), lines)


def shown_path(where: Where) -> str:
    """Return a path as people write it: ``models[0].serve.device``."""
    parts = [f"[{one}]" if isinstance(one, int) else f".{one}" for one in where]
    return f"'{''.join(parts).removeprefix('.')}'" if where else "the whole file"


def _lines(node: Any, where: Where) -> Iterator[tuple[Where, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*where, str(key.value))
            yield place, key.start_mark.line + 1
            yield from _lines(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*where, index), value.start_mark.line + 1
            yield from _lines(value, (*where, index))


def _refuse_loops(name: str, node: Any, above: tuple[int, ...]) -> None:
    """Refuse an anchor that holds itself: nothing could be done with it but to go round."""
    if id(node) in above:
        raise InvalidInputError(f"{name}, line {node.start_mark.line + 1}: this holds itself.")
    inner: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        inner = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = list(node.value)
    for one in inner:
        _refuse_loops(name, one, (*above, id(node)))


def _refuse_twice(document: Document, node: Any, where: Where) -> None:
    """Refuse a key that a mapping has twice: YAML's readers take the last one in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise InvalidInputError(
                    f"{document.name}, line {line}, {shown_path((*where, name))}: it is there twice."
                )
            seen.add(name)
            _refuse_twice(document, value, (*where, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _refuse_twice(document, value, (*where, index))


def _with_variables(document: Document, content: Any, where: Where, environ: Mapping[str, str]) -> Any:
    if isinstance(content, dict):
        return {key: _with_variables(document, one, (*where, str(key)), environ) for key, one in content.items()}
    if isinstance(content, list):
        return [_with_variables(document, one, (*where, index), environ) for index, one in enumerate(content)]
    if not isinstance(content, str):
        return content

    def value(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise document.error(where, f"the environment has no variable {found[1]}. Set it, or leave this out.")
        return environ[found[1]]

    return _VARIABLE.sub(value, content)
