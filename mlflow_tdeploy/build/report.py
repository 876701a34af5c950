"""What a build did, for people and for the caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlflow_tdeploy.core.evidence import Evidence, latest_accuracy
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.decision import align


@dataclass(frozen=True)
class Step:
    """One step that ended, well or not.

    Attributes:
        name: What was done.
        seconds: How long it took.
        detail: The result in a few words.
    """

    name: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.seconds:6.1f} s  {self.name}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class BuildReport:
    """The outcome of a build.

    Attributes:
        manifest: What was written.
        variants: Every variant with a record, those over budget included.
        evidence: Everything measured, by variant id.
        steps: What was done, in order.
    """

    manifest: Manifest
    variants: tuple[Variant, ...]
    evidence: Mapping[str, tuple[Evidence, ...]]
    steps: tuple[Step, ...]

    @property
    def skipped(self) -> Mapping[str, str]:
        """Why a variant that was wanted could not be made, by id."""
        return self.manifest.skipped

    @property
    def seconds(self) -> float:
        """How long everything took."""
        return sum(step.seconds for step in self.steps)

    def table(self) -> str:
        """Return the variants and the steps as text."""
        rows: list[tuple[str, ...]] = [("variant", "precision", "MB", "closeness", "short ms", "opt ms", "verdict")]
        rows += [_row(self.manifest, variant, self.evidence.get(variant.id, ())) for variant in self.variants]
        rows += [(variant_id, "-", "-", "-", "-", "-", f"not made: {why}") for variant_id, why in self.skipped.items()]
        steps = "\n".join(map(str, self.steps))
        return f"{align(rows)}\n\n{steps}\n{self.seconds:6.1f} s  in all"


def _row(manifest: Manifest, variant: Variant, evidence: Iterable[Evidence]) -> tuple[str, ...]:
    records = tuple(evidence)
    accuracy = latest_accuracy(records)
    latency = next((record.metrics for record in reversed(records) if record.kind == "latency"), {})
    size = "-" if variant.dropped else f"{variant.size / 1e6:.0f}"
    times = (f"{latency[name]:.1f}" if name in latency else "-" for name in ("short_p50_ms", "p50_ms"))
    return (
        variant.id,
        variant.precision.name,
        size,
        _closeness(manifest, accuracy),
        *times,
        _verdict(variant, accuracy),
    )


def _closeness(manifest: Manifest, accuracy: Evidence | None) -> str:
    if accuracy is None:
        return "-"
    names = [limit.metric for limit in manifest.budget.limits if limit.metric in accuracy.metrics]
    return ", ".join(f"{name} {accuracy.metrics[name]:.4g}" for name in names) or "-"


def _verdict(variant: Variant, accuracy: Evidence | None) -> str:
    if accuracy is None:
        return "the reference"
    if accuracy.passed:
        return accuracy.verdict
    kept = "; files not kept" if variant.dropped else ""
    return f"{accuracy.verdict}: {'; '.join(accuracy.violations)}{kept}"
