"""Real strings in many scripts: WordNet's definitions, Debian's translations of ISO codes, Python's documentation."""

from __future__ import annotations

import functools
import gettext
import importlib
import inspect
from pathlib import Path

_TRAIN = Path(__file__).parents[1] / "examples" / "wordnet" / "data" / "train.tsv"
_DOMAINS = ("iso3166-1", "iso639-3", "iso15924", "iso4217")
_MODULES = (
    "argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "enum", "functools", "gettext",
    "heapq", "http.client", "inspect", "json", "logging", "math", "os", "pathlib", "re", "shutil", "socket", "sqlite3",
    "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "typing", "unicodedata", "urllib.parse",
    "xml.dom", "zipfile",
)  # fmt: skip


@functools.cache
def corpus() -> tuple[str, ...]:
    """Return more than 20,000 different strings, the same each time on one version of Python."""
    found = [line.split("\t", 1)[1] for line in _TRAIN.read_text(encoding="utf-8").splitlines()[1:]]
    return tuple(dict.fromkeys([*found, *_translations(), *_documentation()]))


def _translations(most: int = 10_000) -> list[str]:
    """Return translations in 160 languages, taken evenly."""
    import pycountry

    found: dict[str, None] = {}
    for folder in sorted(Path(pycountry.LOCALES_DIR).iterdir()):
        for domain in _DOMAINS:
            if (path := folder / "LC_MESSAGES" / f"{domain}.mo").is_file():
                with path.open("rb") as file:
                    messages = gettext.GNUTranslations(file)._catalog
                found.update(dict.fromkeys(text for text in messages.values() if isinstance(text, str) and text))
    texts = list(found)
    return [texts[index * len(texts) // most] for index in range(most)]


def _documentation() -> list[str]:
    """Return paragraphs of docstrings, with their indentation and line breaks."""
    found = []
    for name in _MODULES:
        module = importlib.import_module(name)
        for owner in (module, *(one for _, one in inspect.getmembers(module) if inspect.isclass(one))):
            members = (getattr(one, "__doc__", None) for _, one in inspect.getmembers(owner))
            found += [
                part for text in (owner.__doc__, *members) if isinstance(text, str) for part in text.split("\n\n")
            ]
    return [text for text in dict.fromkeys(found) if text]
