"""What a variant costs on a host: time, memory, size, and money where somebody says what an hour of the host costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import SERVED, Evidence, recorded_shapes
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
        host: The kind of host that it is of; empty for every one.

    Raises:
        InvalidInputError: It is no price.
    """

    per_hour: float
    currency: str = "USD"
    host: str = ""

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
        small: Items of a small request: the fewest that were measured.
        small_ms: Median of such a request, one after the other.
        small_p95_ms: Of twenty such, the slowest takes about so long; None where fewer were timed.
        large: Items of a large request: the most that were measured.
        per_second: Items per second of such requests, one after the other.
        memory_mib: Most memory of the host in a process that serves it alone; None where not measured.
        megabytes: Of its files.
        created: When that was measured, UTC in ISO format.
        small_per_million: What a million items cost in small requests; None without a price for this kind of host.
        large_per_million: What a million items cost in large requests; None without a price for this kind of host.
    """

    variant: str
    runtime: str
    precision: str
    host: str
    measured: str
    small: int
    small_ms: float
    small_p95_ms: float | None
    large: int
    per_second: float
    memory_mib: float | None
    megabytes: float
    created: str = ""
    small_per_million: float | None = None
    large_per_million: float | None = None

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
    return sorted(found.values(), key=lambda one: (one.host, one.small_ms))


def _card(variant: Variant, record: Evidence, bundle: Bundle) -> CostCard | None:
    figures = record.metrics
    known = (variant.id, str(record.settings.get("runtime", "")), variant.precision.name)
    host, size = record.host.kind if record.host else "", variant.size / 1e6
    if record.kind == SERVED:
        sizes = [int(one) for one in record.settings.get("batches", ())]
        if not sizes or not {f"p50_ms_of_{min(sizes)}", f"items_per_s_of_{max(sizes)}"} <= set(figures):
            return None
        small, large = min(sizes), max(sizes)
        return CostCard(
            *known, host, "as served", small, figures[f"p50_ms_of_{small}"], figures.get(f"p95_ms_of_{small}"), large,
            figures[f"items_per_s_of_{large}"], figures.get("memory_mib"), size, record.created,
        )  # fmt: skip
    if record.kind != "latency" or not {"short_p50_ms", "mean_ms"} <= set(figures):
        return None
    small, large = (_rows(bundle, shape) for shape in recorded_shapes(bundle.manifest.signature))
    return CostCard(
        *known, host, "graph", small, figures["short_p50_ms"], figures.get("short_p95_ms"), large,
        large * 1e3 / figures["mean_ms"], None, size, record.created,
    )  # fmt: skip


def _rows(bundle: Bundle, shape: Mapping[str, int]) -> int:
    """Return how many items a graph was timed with at a shape."""
    axes = bundle.manifest.signature.inputs[0].shape
    if not axes:
        return 1
    return axes[0] if isinstance(axes[0], int) else shape[axes[0]]


def _priced(card: CostCard, price: Price | None) -> CostCard:
    if price is None or price.host not in ("", card.host):
        return card
    small, large = price.per_million(card.small * 1e3 / card.small_ms), price.per_million(card.per_second)
    return replace(card, small_per_million=small, large_per_million=large)


def cost_table(cards: Iterable[CostCard], price: Price | None = None) -> str:
    """Return cards as text, a table for each kind of host."""
    found = by_host(cards).items()
    return "\n\n".join(f"{host}\n{align([head(some, price), *map(cells, some)])}" for host, some in found)


def by_host(cards: Iterable[CostCard]) -> dict[str, list[CostCard]]:
    """Return cards by the kind of host that they are of."""
    found: dict[str, list[CostCard]] = {}
    for card in cards:
        found.setdefault(card.host, []).append(card)
    return found


def head(cards: Sequence[CostCard], price: Price | None) -> tuple[str, ...]:
    """Return the names of cards' cells; see :func:`cells`."""
    priced = price is not None and any(card.small_per_million is not None for card in cards)
    money = f"{price.currency} per million" if price and priced else ""
    found = ("variant", "runtime", "measured", "items", "p50 ms", "p95", money, "items", "items/s", money)
    return tuple(name for name in (*found, "memory MiB", "MB") if name)


def cells(card: CostCard) -> tuple[str, ...]:
    """Return a card as text."""
    small, large = ([] if one is None else [f"{one:.3g}"] for one in (card.small_per_million, card.large_per_million))
    return (
        card.variant, card.runtime, card.measured, str(card.small), f"{card.small_ms:.2f}",
        _known(card.small_p95_ms, ".2f"), *small, str(card.large), f"{card.per_second:.0f}", *large,
        _known(card.memory_mib, ".0f"), f"{card.megabytes:.1f}",
    )  # fmt: skip


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
