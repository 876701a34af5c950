"""Tokenizers that transformers has in Python only: which can be kept, what they take, and their files."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tasks._slow_tokenizer import CONFIG, FOLDER, OWN, PACKAGES, names_a_place
from mlflow_tdeploy.core.tasks._text import TextTask

_SENTENCEPIECE = "transformers.tokenization_utils_sentencepiece"
#: What names the machine that a tokenizer was made on, and what would have other code run where it is loaded.
_LEFT_OUT = ("name_or_path", "auto_map")
_OTHERWISE = "log it with task='tensors' and tokenize in the client"


def check_slow(tokenizer: Any, task: str) -> None:
    """Make sure that a tokenizer without a fast form can be served.

    Raises:
        InvalidInputError: Its code is not transformers', the task's answers are places in texts, which such
            tokenizers do not know, or it makes other tokens than of texts.
    """
    name, kind = type(tokenizer).__name__, TASKS.get(task)
    if not type(tokenizer).__module__.startswith(OWN):
        raise InvalidInputError(
            f"{name} is a slow tokenizer of {type(tokenizer).__module__}, not of transformers: a serving host would "
            f"have to run its code. Use a model with a tokenizer of transformers', or {_OTHERWISE}."
        )
    if issubclass(kind, TextTask) and kind.offsets:
        raise InvalidInputError(
            f"{name} is a slow tokenizer without a fast form, which does not know where in a text its tokens are, and "
            f"the answers of '{task}' say where they are from. Use a model with a fast tokenizer, or {_OTHERWISE}."
        )
    if not all(isinstance(one, int) for values in _tokens(tokenizer).values() for one in values):
        raise InvalidInputError(
            f"{name} makes something else than a number of each token (of tables, or of sound): no task of texts "
            f"takes it. You can {_OTHERWISE}."
        )


def _tokens(tokenizer: Any) -> dict[str, list[Any]]:
    try:
        return {name: list(values) for name, values in tokenizer("a").items()}
    except Exception as error:  # whatever a tokenizer of something else than texts says of one
        raise InvalidInputError(
            f"{type(tokenizer).__name__} makes no tokens of a text ({type(error).__name__}: {first_line(error)}). You "
            f"can {_OTHERWISE}."
        ) from error


def slow_settings(tokenizer: Any) -> dict[str, Any]:
    """Return what a text task's settings say of a tokenizer without a fast form; nothing for others."""
    return {} if tokenizer.is_fast else {"tokenizer_packages": _packages(type(tokenizer))}


def write_slow(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's own files below a folder.

    Raises:
        InvalidInputError: One of its settings names a place of this machine.
    """
    target = folder / FOLDER
    tokenizer.save_pretrained(str(target))
    path = target / CONFIG
    said = {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name not in _LEFT_OUT}
    if place := names_a_place(said):
        raise InvalidInputError(
            f"{type(tokenizer).__name__} reads a dictionary of this machine ({place}), which a serving host has not. "
            f"Use one that is a Python package (unidic-lite, ipadic), or {_OTHERWISE}."
        )
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def _packages(kind: type) -> list[str]:
    """Return the distributions whose modules a tokenizer's code imports and that are here, transformers first.

    SudachiPy finds its dictionary by name: those that are here come with it.
    """
    modules = {cls.__module__ for cls in kind.__mro__}
    read = sorted(name for name in modules if name.startswith(OWN) or name == _SENTENCEPIECE)
    imported = {one for name in read for one in _imports(inspect.getsource(sys.modules[name]))}
    owners = importlib.metadata.packages_distributions()
    if "sudachipy" in imported:
        imported |= {name for name in owners if name.startswith("sudachidict")}
    found = {re.sub(r"[-_.]+", "-", owner).lower() for name in imported for owner in owners.get(name, ())}
    return ["transformers", *(name for name in PACKAGES[1:] if name in found)]


def _imports(source: str) -> Iterator[str]:
    """Yield the names of the packages that a module imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (one.name.split(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
