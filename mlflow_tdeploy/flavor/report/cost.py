"""What a variant costs on a host: time, memory, size, and money where somebody says what an hour of the host costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import SERVED, Evidence
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.decision import align
from mlflow_tdeploy.store.bundle import Bundle

#: Items that a price is for.
_MILLION = 1e6
_HOUR = 3600.0


@dataclass(frozen=True)
class Price:
    """What an hour of a host costs.

    Attributes:
        per_hour: The price.
        currency: Of what.

    Raises:
        InvalidInputError: It is no price.
    """

    per_hour: float
    currency: str = "USD"

    def __post_init__(self) -> None:
        if isinstance(self.per_hour, bool) or not isinstance(self.per_hour, (int, float)):
            raise InvalidInputError(f"The price of an hour must be a number, got {self.per_hour!r}.")
        if not (math.isfinite(self.per_hour) and self.per_hour >= 0):
            raise InvalidInputError(f"The price of an hour must be 0 or more, got {self.per_hour!r}.")

    def per_million(self, per_second: float) -> float:
        """Return what a million items cost on a host that answers so many a second, and is busy all the time."""
        return self.per_hour / _HOUR / per_second * _MILLION


@dataclass(frozen=True)
class CostCard:
    """One variant on one kind of host.

    Attributes:
        variant: Its id.
        runtime: What opened it.
        precision: Of the variant.
        host: The kind of host.
        measured: ``as served``: from a request to its answer; ``graph``: the graph alone, as a build measures it.
        lone_ms: Median of a request of one item, one after the other.
        lone_p95_ms: Of twenty such, the slowest takes about so long; None where fewer were timed.
        bulk: Items of a large request.
        per_second: Items per second of such requests, one after the other.
        memory_mib: Most memory of the host in a process that serves it alone; None where not measured.
        megabytes: Of its files.
        created: When that was measured, UTC in ISO format.
        lone_per_million: What a million requests of one item cost; None without a price.
        bulk_per_million: What a million items in large requests cost; None without a price.
    """

    variant: str
    runtime: str
    precision: str
    host: str
    measured: str
    lone_ms: float
    lone_p95_ms: float | None
    bulk: int
    per_second: float
    memory_mib: float | None
    megabytes: float
    created: str = ""
    lone_per_million: float | None = None
    bulk_per_million: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def cost_cards(bundle: Bundle, price: Price | None = None) -> list[CostCard]:
    """Return a card for each variant and kind of host that was measured, from the newest measurement of each.

    What was measured as it serves comes before what a build measured of the graph alone.

    Args:
        bundle: The model.
        price: What an hour of such a host costs.
    """
    found: dict[tuple[str, str, str], CostCard] = {}
    for variant in bundle.variants.values():
        records = sorted(bundle.evidence(variant.id), key=lambda one: (one.kind == SERVED, one.created))
        for record in records:
            if (card := _card(variant, record, bundle)) is not None:
                found[card.host, variant.id, card.runtime] = _priced(card, price)
    return sorted(found.values(), key=lambda one: (one.host, one.lone_ms))


def _card(variant: Variant, record: Evidence, bundle: Bundle) -> CostCard | None:
    figures = record.metrics
    known = (variant.id, str(record.settings.get("runtime", "")), variant.precision.name)
    host, size = record.host.kind if record.host else "", variant.size / 1e6
    if record.kind == SERVED:
        sizes = [int(one) for one in record.settings.get("batches", ())]
        if not sizes or f"p50_ms_of_{min(sizes)}" not in figures:
            return None
        small, large = min(sizes), max(sizes)
        return CostCard(
            *known, host, "as served", figures[f"p50_ms_of_{small}"], figures.get(f"p95_ms_of_{small}"), large,
            figures[f"items_per_s_of_{large}"], figures.get("memory_mib"), size, record.created,
        )  # fmt: skip
    if record.kind != "latency" or not {"short_p50_ms", "mean_ms"} <= set(figures):
        return None
    rows = _rows(bundle)
    return CostCard(
        *known, host, "graph", figures["short_p50_ms"], figures.get("short_p95_ms"), rows,
        rows * 1e3 / figures["mean_ms"], None, size, record.created,
    )  # fmt: skip


def _rows(bundle: Bundle) -> int:
    """Return how many items a graph was timed with at the usual sizes."""
    signature = bundle.manifest.signature
    axes = signature.inputs[0].shape
    if not axes:
        return 1
    return axes[0] if isinstance(axes[0], int) else signature.dim(axes[0]).opt


def _priced(card: CostCard, price: Price | None) -> CostCard:
    if price is None:
        return card
    lone, bulk = price.per_million(1e3 / card.lone_ms), price.per_million(card.per_second)
    return CostCard(**{**asdict(card), "lone_per_million": lone, "bulk_per_million": bulk})


def cost_table(cards: Iterable[CostCard], price: Price | None = None) -> str:
    """Return cards as text, a table for each kind of host."""
    by_host: dict[str, list[CostCard]] = {}
    for card in cards:
        by_host.setdefault(card.host, []).append(card)
    return "\n\n".join(f"{host}\n{align([head(price), *map(cells, some)])}" for host, some in by_host.items())


def head(price: Price | None) -> tuple[str, ...]:
    """Return the names of a card's cells; see :func:`cells`."""
    money = (f"{price.currency} a million, alone", f"{price.currency} a million, in bulk") if price else ()
    return ("variant", "runtime", "measured", "one: p50 ms", "p95", "items/s in bulk", "of", "memory MiB", "MB", *money)


def cells(card: CostCard) -> tuple[str, ...]:
    """Return a card as text."""
    money = [f"{one:.3g}" for one in (card.lone_per_million, card.bulk_per_million) if one is not None]
    return (
        card.variant, card.runtime, card.measured, f"{card.lone_ms:.2f}", _known(card.lone_p95_ms, ".2f"),
        f"{card.per_second:.0f}", str(card.bulk), _known(card.memory_mib, ".0f"), f"{card.megabytes:.1f}", *money,
    )  # fmt: skip


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
