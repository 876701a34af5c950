"""What was measured about a variant: append-only records."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.records import check_version
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.core.variant import Variant, check_variant_id

#: Latest form of an evidence record that this package reads; it writes the earliest that holds what there is to say.
EVIDENCE_SCHEMA = 1
#: Kind of evidence: what a variant tells once it is open, such as the layers of an engine; in its settings.
OPENED = "opened"
#: Kinds of evidence: a variant as it serves, from requests to answers, by what ``analyze_model`` measures; and medians
#: of its graph over sizes, in its settings' ``rows``.
SERVED, SWEEP = "served", "sweep"
#: Size of every named dimension.
Shape = dict[str, int]
_SHORT: Shape = {"batch": 1, "sequence": 16}


@dataclass(frozen=True)
class DataRecord:
    """Which data a measurement used.

    Attributes:
        name: Where it is from.
        sha256: Digest of the data itself.
        count: How many items.
    """

    name: str
    sha256: str
    count: int


@dataclass(frozen=True)
class Evidence:
    """One measurement.

    Attributes:
        variant: Id of the variant measured.
        kind: ``accuracy`` (against the reference), ``latency``, ``opened`` (what it tells about itself), ``served`` and
            ``sweep`` (what it costs), or what only newer versions measure.
        metrics: Finite numbers by name; latencies in milliseconds.
        data: What it was measured on.
        host: The host it was measured on.
        passed: For accuracy: whether the model's budget holds.
        violations: Why not, one sentence per broken limit.
        shapes: The shapes covered, for example ``batch=8,sequence=128``.
        settings: What else belongs to the figure: threads, repetitions, token budget, runtime.
        created: UTC time in ISO format.
        files: :attr:`Variant.digest` of the files that were measured; None where it was not noted.
        schema_version: Version of the record's form.
    """

    variant: str
    kind: str
    metrics: Mapping[str, float]
    data: DataRecord | None = None
    host: Fingerprint | None = None
    passed: bool | None = None
    violations: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    files: str | None = None
    schema_version: int = 1

    def __post_init__(self) -> None:
        check_version(self.schema_version)
        if not self.kind:
            raise InvalidInputError(f"Evidence about '{self.variant}' has no kind: use accuracy or latency.")
        check_variant_id(self.variant)

    @property
    def verdict(self) -> str:
        """What accuracy evidence comes to: ``within budget``, ``over budget`` or, without any figure, ``failed``."""
        return verdict(self.violations, self.metrics)

    def about(self, variant: Variant) -> bool:
        """Tell whether this was measured on the very files of a variant.

        Where two hosts add the same id at once, the loser's evidence may lie beside the winner's files. A variant
        without files can have failed only.
        """
        if self.variant != variant.id:
            return False
        if variant.dropped:
            return self.passed is not True
        return self.files is None or self.files == variant.digest


def verdict(violations: Collection[str], metrics: Mapping[str, float]) -> str:
    """Return what to call an outcome; a variant without any answer to compare has failed, not missed the budget."""
    if not violations:
        return "within budget"
    return "over budget" if metrics else "failed"


def recorded_shapes(signature: Signature) -> tuple[Shape, Shape]:
    """Return the short and the *opt* shape: the two whose figures a bundle holds."""
    short = {dim.name: max(dim.min, min(dim.max, _SHORT.get(dim.name, dim.min))) for dim in signature.dims}
    return short, {dim.name: dim.opt for dim in signature.dims}


def shape_text(shape: Shape) -> str:
    """Return the sizes for a reader, for example ``batch=8,sequence=128``."""
    return ",".join(f"{name}={size}" for name, size in shape.items()) or "fixed"


def now() -> str:
    """Return the UTC time in ISO format, as :attr:`Evidence.created` holds it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def after(earlier: Iterable[Evidence]) -> str:
    """Return the time for a record that comes after others: now, or just later where another host's clock is ahead."""
    newest = max((record.created for record in earlier), default="")
    if newest < (present := now()):
        return present
    try:
        return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")
    except (ValueError, OverflowError):  # no time, or the end of it
        return present


def latest_accuracy(evidence: Iterable[Evidence]) -> Evidence | None:
    """Return the newest accuracy record, by time."""
    records = [record for record in evidence if record.kind == "accuracy"]
    return max(records, key=lambda record: record.created, default=None)


def measured_latency(evidence: Iterable[Evidence], host: Fingerprint, runtime: str) -> float | None:
    """Return the newest median latency in ms measured with ``runtime`` on this kind of host, if any."""
    records = [
        record
        for record in evidence
        if record.kind == "latency"
        and record.host is not None
        and record.host.kind == host.kind
        and record.settings.get("runtime") == runtime
        and "p50_ms" in record.metrics
    ]
    newest = max(records, key=lambda record: record.created, default=None)
    return newest.metrics["p50_ms"] if newest else None
