"""How large an environment that serves is: the installed files of a requirement and all it needs."""

from __future__ import annotations

import importlib.metadata as metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.report import Figure

_SERVING = ("mlflow-tdeploy[cpu]",)
_PEER = ("mlflow", "sentence-transformers", "torch")
_ROOT = Path(__file__).parents[1]


def closure(requirements: Iterable[str]) -> tuple[dict[str, metadata.Distribution], list[str]]:
    """Return the installed distributions that requirements need, and the names of those not installed."""
    queue = [Requirement(text) for text in requirements]
    found: dict[str, metadata.Distribution] = {}
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += _needs(found[name], extra)
    return found, sorted(missing)


def installed_bytes(distribution: metadata.Distribution) -> int:
    """Return the bytes of a distribution's files; of its source packages where it is installed editable."""
    origin = distribution.read_text("direct_url.json")
    if origin and json.loads(origin).get("dir_info", {}).get("editable"):
        return sum(
            file.stat().st_size for file in _ROOT.glob("mlflow_tdeploy/**/*.*") if "__pycache__" not in file.parts
        )
    paths = {Path(str(distribution.locate_file(file))) for file in distribution.files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure(serving: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Measure environments that serve.

    Args:
        serving: A real one with our package, made by pip.

    Returns:
        The size of that one; by the requirements of what is installed here, ours again and that of a peer.
    """
    size = sum(path.stat().st_size for path in serving.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6
    found = [Figure("serving environment, as pip makes it", size, "MB", note="with pip and compiled modules")]
    details: dict[str, Any] = {"serving environment": size}
    for requirements in (_SERVING, _PEER):
        distributions, missing = closure(requirements)
        sizes = {name: installed_bytes(distribution) / 1e6 for name, distribution in distributions.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        note = f"{len(sizes)} packages; " + ", ".join(f"{name} {sizes[name]:.0f}" for name in largest)
        title = " + ".join(requirements)
        found.append(Figure(f"environment of {title}", sum(sizes.values()), "MB", note=note))
        details[title] = {"megabytes": sizes, "not_installed": missing}
    return found, details


def _needs(distribution: metadata.Distribution, extra: str) -> list[Requirement]:
    requirements = [Requirement(text) for text in distribution.requires or ()]
    return [one for one in requirements if one.marker is None or _applies(one, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    assert requirement.marker is not None
    if not extra:
        return requirement.marker.evaluate({"extra": ""})
    # What an extra adds: true with it, not without it.
    return requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})
