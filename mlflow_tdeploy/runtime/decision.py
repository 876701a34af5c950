"""The choice of a host, for people and programs to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mlflow_tdeploy.core.errors import NoVariantError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.runtime.base import RUNTIMES, Fit
from mlflow_tdeploy.runtime.policy import Policy


@dataclass(frozen=True)
class Candidate:
    """One variant on one runtime.

    Attributes:
        variant: Id of the variant.
        runtime: Name of the runtime; empty where none opens its format.
        fit: How well it fits.
        reason: Why, as one sentence.
        precision: The variant's precision name.
        size: Bytes of the variant's files.
        latency_ms: Median measured on this kind of host, if any.
        lacking: Whether it is refused only because software is missing or too old on this host, or the verdict on it
            is damaged. Serving another variant instead is a fallback.
    """

    variant: str
    runtime: str
    fit: Fit
    reason: str
    precision: str = ""
    size: int = 0
    latency_ms: float | None = None
    lacking: bool = False

    @property
    def can_open(self) -> bool:
        """Whether opening it may be tried."""
        return self.fit in (Fit.OPTIMAL, Fit.USABLE)


@dataclass(frozen=True)
class Decision:
    """The choice of a host.

    Attributes:
        host: The host.
        policy: What the user insisted on.
        candidates: Every variant on every runtime, best first, those that cannot serve last.
        chosen: The one that serves; before anything was opened, the first to try.
        failures: Why better choices do not serve, as sentences: software that this host lacks, records that are
            damaged, and what was tried and failed. Empty when the first choice serves.
        measured_at: The shape that latencies are of, for example ``batch=8,sequence=128``.
    """

    host: Fingerprint
    policy: Policy
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None = None
    failures: tuple[str, ...] = ()
    measured_at: str = ""

    @property
    def openable(self) -> tuple[Candidate, ...]:
        """Candidates that may be tried, best first; only the first under ``strict``."""
        found = tuple(candidate for candidate in self.candidates if candidate.can_open)
        if not self.policy.strict:
            return found
        return () if self.failures else found[:1]

    def failed(self, candidate: Candidate, why: str) -> Decision:
        """Return the decision after ``candidate`` turned out not to work."""
        changed = tuple(replace(c, fit=Fit.UNSUPPORTED, reason=why) if c is candidate else c for c in self.candidates)
        first = next((c for c in changed if c.can_open), None)
        text = f"{candidate.variant} on {candidate.runtime}: {why}"
        return replace(self, candidates=changed, chosen=first, failures=(*self.failures, text))

    def explain(self) -> str:
        """Return the decision as a table for people: which serves, and why each other one does not."""
        rows = [("variant", "runtime", "fit", "p50 ms", "why")]
        for candidate in self._worth_showing():
            latency = f"{candidate.latency_ms:.2f}" if candidate.latency_ms is not None else "-"
            mark = "serves" if candidate == self.chosen else candidate.fit.value
            why = self.why(candidate)
            rows.append((candidate.variant, candidate.runtime or "-", mark, latency, why))
        if all(candidate.latency_ms is None for candidate in self.candidates):
            return align(rows)
        return f"{align(rows)}\np50 ms: measured on this kind of host, one call of {self.measured_at}"

    def _worth_showing(self) -> list[Candidate]:
        """Leave out what says nothing new: runtimes that do not open what another one does.

        What keeps a variant from several runtimes for one reason is said once, without naming any of them.
        """
        openable = {candidate.variant for candidate in self.candidates if candidate.can_open}
        shown: dict[tuple[str, str, str], Candidate] = {}
        for candidate in self.candidates:
            if candidate.can_open or candidate.lacking:
                shown[candidate.variant, candidate.runtime, ""] = candidate
            elif candidate.variant not in openable:
                key = (candidate.variant, "", candidate.reason)
                shown[key] = replace(candidate, runtime="") if key in shown else candidate
        return list(shown.values())

    def why(self, candidate: Candidate) -> str:
        """Return why a candidate serves, cannot, or comes behind the one that serves."""
        return candidate.reason + self._behind(candidate)

    def _behind(self, candidate: Candidate) -> str:
        """Say why a candidate that could serve does not."""
        chosen = self.chosen
        if chosen is None or candidate == chosen or not candidate.can_open:
            return ""
        if RUNTIMES.get(candidate.runtime).tier > RUNTIMES.get(chosen.runtime).tier:
            return f"; serves only where nothing on {chosen.runtime} can"
        if candidate.latency_ms is None:
            return "; not measured on this kind of host" if chosen.latency_ms is not None else "; ranks after"
        if not chosen.latency_ms:
            return "; ranks after one that was not measured on this kind of host"
        if candidate.latency_ms < chosen.latency_ms:
            return "; as fast as the one that serves, which is more precise"
        return f"; {candidate.latency_ms / chosen.latency_ms:.2f}x the time here"

    def as_dict(self) -> dict[str, Any]:
        """Return the decision as plain values, for logs and JSON."""
        return {
            "host": self.host.kind,
            "chosen": {"variant": self.chosen.variant, "runtime": self.chosen.runtime} if self.chosen else None,
            "candidates": [
                {**{k: v for k, v in vars(c).items() if v is not None}, "fit": c.fit.value} for c in self.candidates
            ],
            "failures": list(self.failures),
            "latency_measured_at": self.measured_at,
        }

    def none_left(self, kind: type[NoVariantError] = NoVariantError) -> NoVariantError:
        """Return the error to raise when nothing can serve.

        Args:
            kind: Its class.
        """
        why = (
            self.failures
            or self._mismatch()
            or tuple(f"{c.variant}{' on ' * bool(c.runtime)}{c.runtime}: {c.reason}" for c in self._worth_showing())
            or ("It has no variants",)
        )
        asked = f" (asked for: {wanted})" if (wanted := self.policy.asked()) else ""
        reasons = "; ".join(one.rstrip(".") for one in why)
        free = self.policy.strict and not (self.policy.variant or self.policy.runtime)
        hint = " Without strict, another variant would be tried." if free else ""
        return kind(f"No variant of this model can serve here{asked}. {reasons}.{hint}")

    def _mismatch(self) -> tuple[str, ...]:
        """Say that the runtime that is insisted on opens none of the model's variants."""
        runtime = self.policy.runtime
        if runtime is None or any(candidate.runtime == runtime for candidate in self.candidates):
            return ()
        formats = ", ".join(sorted(RUNTIMES.get(runtime).formats))
        return (f"The runtime '{runtime}' opens the format {formats}, which no variant of this model has",)


def align(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows of text as aligned columns."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
