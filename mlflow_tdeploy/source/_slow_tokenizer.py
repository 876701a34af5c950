"""Tokenizers that transformers has in Python only: which can be kept, what they take, and their files."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tasks._slow_tokenizer import FOLDER
from mlflow_tdeploy.core.tasks._text import TextTask

_OWN = "transformers.models."
#: What names the machine that a tokenizer was made on, and what would have other code run where it is loaded.
_LEFT_OUT = ("name_or_path", "auto_map")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")


def check_slow(tokenizer: Any, task: str) -> None:
    """Make sure that a tokenizer without a fast form can be served.

    Raises:
        InvalidInputError: Its code is not transformers', or the task's answers are places in texts, which such
            tokenizers do not know.
    """
    name, kind = type(tokenizer).__name__, TASKS.get(task)
    if not type(tokenizer).__module__.startswith(_OWN):
        raise InvalidInputError(
            f"{name} is a slow tokenizer of {type(tokenizer).__module__}, not of transformers: a serving host would "
            f"have to run its code. Convert it to a fast one (transformers.convert_slow_tokenizer), or log the model "
            f"with task='tensors' and tokenize in the client."
        )
    if issubclass(kind, TextTask) and kind.offsets:
        raise InvalidInputError(
            f"{name} is a slow tokenizer without a fast form, which does not know where in a text its tokens are, and "
            f"the answers of '{task}' say where they are from. Use a model with a fast tokenizer, or convert this one "
            f"with transformers.convert_slow_tokenizer."
        )


def slow_settings(tokenizer: Any) -> dict[str, Any]:
    """Return what a text task's settings say of a tokenizer without a fast form; nothing for others."""
    return {} if tokenizer.is_fast else {"tokenizer_packages": _packages(type(tokenizer))}


def write_slow(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's own files below a folder.

    Raises:
        InvalidInputError: One of them would run code where it is read.
    """
    target = folder / FOLDER
    tokenizer.save_pretrained(str(target))
    if pickles := sorted(path.name for path in target.iterdir() if path.suffix in _PICKLES):
        raise InvalidInputError(
            f"{type(tokenizer).__name__} keeps its vocabulary in '{pickles[0]}': loading such files can run code. "
            f"Log the model with task='tensors' and tokenize in the client."
        )
    path = target / "tokenizer_config.json"
    said = {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name not in _LEFT_OUT}
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def _packages(kind: type) -> list[str]:
    """Return the distributions whose modules a tokenizer's code imports and that are here, transformers first."""
    modules = {cls.__module__ for cls in kind.__mro__}
    read = [
        name for name in sorted(modules) if name.startswith(_OWN) or name.endswith("tokenization_utils_sentencepiece")
    ]
    imported = {one for name in read for one in _imports(inspect.getsource(sys.modules[name]))}
    owners = importlib.metadata.packages_distributions()
    found = {owner for name in imported for owner in owners.get(name, ())} - {"torch", "transformers", "numpy"}
    return ["transformers", *sorted(found)]


def _imports(source: str) -> Iterator[str]:
    """Yield the names of the packages that a module imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (one.name.split(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
