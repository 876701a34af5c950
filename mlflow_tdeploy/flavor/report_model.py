"""``report_model``: a model's page again, with what was measured since it was logged."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import first_line
from mlflow_tdeploy.flavor.measure import record_service
from mlflow_tdeploy.flavor.report.cost import CostCard, Price, cost_cards, cost_table
from mlflow_tdeploy.flavor.report.page import PAGE, Page, page
from mlflow_tdeploy.registry_io import locate, mlflow_errors, open_records
from mlflow_tdeploy.registry_io.append import put_beside
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import storage_errors

_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class Report:
    """What :func:`report_model` made.

    Attributes:
        place: Where the page is: a file, or the model's URI and the page's name in it.
        cards: A cost card for each variant and kind of host.
        price: What prices in them are of.
    """

    place: str
    cards: tuple[CostCard, ...]
    price: Price | None = None

    def table(self) -> str:
        """Return the cost cards as text."""
        return cost_table(self.cards, self.price)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        price = {"per_hour": self.price.per_hour, "currency": self.price.currency} if self.price else None
        return {"report": self.place, "price": price, "cards": [card.as_dict() for card in self.cards]}


@mlflow_errors()
def report_model(
    model_uri: str,
    *,
    out: str | Path | None = None,
    measure: bool = False,
    data: Any = None,
    batches: Iterable[int] = (1, 32),
    price_per_hour: float | None = None,
    currency: str = "USD",
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Make a model's report again: one HTML page and PNG files beside it, from all evidence that there is by now.

    Without ``out`` it takes the place of the one that was logged, ``report.html`` and ``report/`` beside the bundle,
    where MLflow's UI shows it among the model's artifacts.

    Args:
        model_uri: The model, see :func:`extend_model`; a local one or one behind a server.
        out: A folder to write to instead.
        measure: Whether to measure first: every variant that this host can open as it serves (latency, throughput,
            memory), and its graph over batch and length. That is added to the model's evidence.
        data: What to ask then, see :func:`analyze_model`.
        batches: How many items requests have then.
        price_per_hour: What an hour of a host like this one costs, for prices of a million requests; those of other
            kinds of hosts get none.
        currency: Of the price.
        progress: Called with each step of measuring and how long it took.

    Returns:
        Where the page is, and the cost cards.

    Raises:
        MlflowException: There is no such model, its store takes no files, or the price is none.
    """
    price = None if price_per_hour is None else Price(price_per_hour, currency, probe.host().kind)
    location = locate(model_uri)
    if measure:
        record_service(location, data, batches=batches, progress=progress)
    bundle, _ = open_records(location)
    made = _page(bundle, location.uri if location.model_id else "", price)  # a folder of this host is nobody else's
    cards = tuple(cost_cards(bundle, price))
    if out is not None:
        folder = Path(out)
        with storage_errors(f"write '{folder}'"):
            return Report(str(made.write(folder)), cards, price)
    with tempfile.TemporaryDirectory(prefix="tdeploy-report-") as scratch:
        made.write(Path(scratch))
        place = put_beside(location, Path(scratch))
    return Report(f"{place}/{PAGE}", cards, price)


def write_report(bundle: Bundle, folder: Path) -> None:
    """Write the report of a model that is being logged; the model is whole without it, so a failure is a warning."""
    try:
        _page(bundle, "", None).write(folder)
    except Exception as error:
        _log.warning("The model is logged without its report (tdeploy report makes it later): %s", first_line(error))


def _page(bundle: Bundle, uri: str, price: Price | None) -> Page:
    source = bundle.manifest.source
    name = source.name or source.architecture or bundle.manifest.task
    return page(bundle, decide_bundle(bundle, probe.host()), title=name, uri=uri, price=price)
