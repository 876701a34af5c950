"""The report as one HTML page that takes nothing from anywhere, and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.flavor.report import facts
from mlflow_tdeploy.flavor.report.cost import Price
from mlflow_tdeploy.flavor.report.plots import plots
from mlflow_tdeploy.registry_io.fetch import REPORT
from mlflow_tdeploy.runtime.decision import Decision
from mlflow_tdeploy.store.bundle import Bundle

#: Names in a model's directory.
PAGE, FOLDER = REPORT


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        html: The page.
        pictures: PNG files by name.
    """

    html: str
    pictures: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Write the page to a folder, and its pictures to one in it; return the page's path."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        for old in (folder / FOLDER).glob("*.png"):
            old.unlink()
        for name, content in self.pictures.items():
            (folder / FOLDER / name).write_bytes(content)
        (folder / PAGE).write_text(self.html, encoding="utf-8")
        return folder / PAGE


def page(bundle: Bundle, decision: Decision, *, title: str, uri: str = "", price: Price | None = None) -> Page:
    """Return a model's report.

    Args:
        bundle: The model; its weights are not needed.
        decision: What this host would serve.
        title: What to call the model.
        uri: Where it is; empty while it is being logged.
        price: What an hour of a host costs.
    """
    drawn = plots(bundle)
    html = _template().render(
        title=title,
        css=(resources.files(__package__) / "page.css").read_text(encoding="utf-8"),
        about=facts.about(bundle, uri),
        serves=decision.chosen,
        signature=facts.signature(bundle),
        variants=facts.variants(bundle),
        plots=[(one, one.svg()) for one in drawn],
        costs=facts.costs(bundle, price),
        price=price,
        decision=facts.decision(decision),
        golden=facts.golden(bundle),
        made_with=sorted(bundle.manifest.made_with.items()),
        version=metadata.version("mlflow-tdeploy"),
        at=now()[:19].replace("T", " "),
    )
    return Page(html, {f"{one.name}.png": one.png() for one in drawn})


def _template() -> Any:
    import jinja2

    text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    kind = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return kind.from_string(text)
