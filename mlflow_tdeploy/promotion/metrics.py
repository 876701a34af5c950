"""What a watcher counts, for Prometheus."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mlflow_tdeploy.promotion.history import Event
from mlflow_tdeploy.promotion.watch import View

_PLACE = ("target", "name", "server")


class Metrics:
    """Counters of this process, and what was seen at the last look.

    Args:
        view: Returns that.
    """

    def __init__(self, view: Callable[[], View]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfView(view))
        self._decisions = Counter(
            "tdeploy_decisions", "What became of versions", ["target", "name", "decision"], registry=self._registry
        )
        self._webhooks = Counter(
            "tdeploy_webhooks", "Requests to /webhook, by what became of them", ["result"], registry=self._registry
        )

    def decided(self, event: Event) -> None:
        """Count what became of a version."""
        self._decisions.labels(event.target, event.name, event.decision).inc()

    def received(self, result: str) -> None:
        """Count a request to ``/webhook``."""
        self._webhooks.labels(result).inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus's format."""
        return generate_latest(self._registry)


class _OfView(Collector):
    """Names that are gone are gone here, too: each scrape is made of the last look."""

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def collect(self) -> Iterator[GaugeMetricFamily]:
        view = self._view()
        for name, text, value in (
            ("tdeploy_looks", "Looks at registry and servers since the start", float(view.looks)),
            ("tdeploy_look_seconds", "How long the last look took", view.seconds),
            ("tdeploy_look_failed", "Whether the last look failed", float(bool(view.error))),
            ("tdeploy_last_good_look_timestamp_seconds", "When the last look that went well was", _seconds(view.at)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        wants = GaugeMetricFamily("tdeploy_wanted_version", "Version that should answer", labels=_PLACE)
        serves = GaugeMetricFamily("tdeploy_serving_version", "Version that answers", labels=_PLACE)
        states = GaugeMetricFamily("tdeploy_state", "1 for the state of a name on a server", labels=(*_PLACE, "state"))
        for one in view.standings:
            place = (one.target, one.name, one.server)
            states.add_metric((*place, one.state), 1.0)
            for family, version in ((wants, one.wants), (serves, one.serves)):
                if version is not None:
                    family.add_metric(place, float(version))
        yield from (wants, serves, states)


def _seconds(at: str) -> float:
    return datetime.datetime.fromisoformat(at).timestamp() if at else 0.0
