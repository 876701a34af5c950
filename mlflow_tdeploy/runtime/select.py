"""Which variant serves on a host, on which runtime, and why not the others. Pure: opens nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, NoVariantError, shown
from mlflow_tdeploy.core.evidence import Evidence, latest_accuracy, measured_latency, recorded_shapes, shape_text
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime
from mlflow_tdeploy.runtime.options import parse_value
from mlflow_tdeploy.store.bundle import Bundle

#: Environment variables that force a choice.
ENVIRONMENT = {"variant": "TDEPLOY_VARIANT", "runtime": "TDEPLOY_RUNTIME", "strict": "TDEPLOY_STRICT"}
#: Medians of one variant, measured twice, may differ as much: below that, precision decides.
_NOISE = 1.05
_FIT_ORDER = {Fit.OPTIMAL: 0, Fit.USABLE: 1, Fit.REBUILD: 2, Fit.UNSUPPORTED: 3}


@dataclass(frozen=True)
class Policy:
    """What the user insists on.

    Attributes:
        variant: Only this variant; None for any.
        runtime: Only this runtime; None for any.
        strict: Never fall back: if the first choice fails, fail.
        origins: Where each of them comes from, if not from who calls: an environment variable or the model.
    """

    variant: str | None = None
    runtime: str | None = None
    strict: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] = os.environ,
        saved: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Read a policy: from what somebody says now, then from the environment, then from what was saved.

        Args:
            config: ``variant``, ``runtime`` and ``strict``, as said now; an empty text lifts what was saved.
            environ: Environment variables.
            saved: The same keys, as whoever logged the model left them.

        Raises:
            InvalidInputError: A value of a wrong type.
        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, variable in ENVIRONMENT.items():
            said, default = (config or {}).get(key), (saved or {}).get(key)
            if said is None or (isinstance(said, str) and not said):
                lifted = said is not None
                if said := environ.get(variable):
                    origins[key] = variable
                elif not lifted and (said := default):
                    origins[key] = "saved with the model"
            values[key] = "" if said is None else said
        variant, runtime = (parse_value(key, values[key], str).strip() or None for key in ("variant", "runtime"))
        return cls(variant, runtime, parse_value("strict", values["strict"], bool), origins)

    def asked(self) -> str:
        """Return what is insisted on, and where that comes from; empty when nothing is."""
        values = {"variant": self.variant, "runtime": self.runtime, "strict": self.strict}
        return ", ".join(f"{key}={value!r}{self.origin(key)}" for key, value in values.items() if value)

    def origin(self, key: str) -> str:
        """Return in parentheses where a value comes from, for a message; empty where the caller said it."""
        return f" ({self.origins[key]})" if key in self.origins else ""


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
        lacking: Whether it is refused only because software is missing or too old on this host. Serving another
            variant instead is a fallback.
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
        failures: Why better choices do not serve, as sentences: software that this host lacks, and what was tried
        and failed. Empty when the first choice serves.
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
        for candidate in self.candidates:
            latency = f"{candidate.latency_ms:.2f}" if candidate.latency_ms is not None else "-"
            mark = "serves" if candidate == self.chosen else candidate.fit.value
            why = candidate.reason + self._behind(candidate)
            rows.append((candidate.variant, candidate.runtime or "-", mark, latency, why))
        if all(candidate.latency_ms is None for candidate in self.candidates):
            return align(rows)
        return f"{align(rows)}\np50 ms: measured on this kind of host, one call of {self.measured_at}"

    def _behind(self, candidate: Candidate) -> str:
        """Say why a candidate that could serve does not."""
        chosen = self.chosen
        if chosen is None or candidate == chosen or not candidate.can_open:
            return ""
        if RUNTIMES.get(candidate.runtime).tier > RUNTIMES.get(chosen.runtime).tier:
            return f"; serves only where nothing on {chosen.runtime} can"
        if candidate.latency_ms is None:
            return "; not measured on this kind of host" if chosen.latency_ms is not None else "; ranks after"
        if chosen.latency_ms and candidate.latency_ms < chosen.latency_ms:
            return "; as fast as the one that serves, which is more precise"
        return f"; {candidate.latency_ms / (chosen.latency_ms or candidate.latency_ms):.2f}x the time here"

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
        why = self.failures or tuple(f"{c.variant} on {c.runtime or 'no runtime'}: {c.reason}" for c in self.candidates)
        asked = f" (asked for: {wanted})" if (wanted := self.policy.asked()) else ""
        reasons = "; ".join(one.rstrip(".") for one in why)
        free = self.policy.strict and not (self.policy.variant or self.policy.runtime)
        hint = " Without strict, another variant would be tried." if free else ""
        return kind(f"No variant of this model can serve here{asked}. {reasons}.{hint}")


def align(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows of text as aligned columns."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def decide(
    manifest: Manifest,
    variants: Mapping[str, Variant],
    evidence: Mapping[str, Iterable[Evidence]],
    host: Fingerprint,
    policy: Policy | None = None,
    *,
    absent: Mapping[str, str] | None = None,
    doubts: Mapping[str, str] | None = None,
) -> Decision:
    """Rank every variant × runtime on a host.

    Order: GPU before CPU before the reference; then latency measured on this kind of host, shortest first; else fit,
    the runtime's preference and lower precision first. A variant needs a passing accuracy record; the reference needs
    none. A better variant that this host lacks software for is named in ``failures``; under ``strict`` nothing is
    served instead of it.

    Args:
        manifest: The model.
        variants: Its variants by id.
        evidence: What was measured about each, by id.
        host: The host.
        policy: What the user insists on.
        absent: Why further variants never serve, by id: they were not made, or their records cannot be read.
        doubts: Why the newest verdict on a variant cannot be read, by id: it does not serve, unless it is the
            reference, which needs none.

    Raises:
        InvalidInputError: The policy names a variant or runtime that does not exist.
    """
    policy, absent, doubts = policy or Policy(), absent or {}, doubts or {}
    _check_names({*variants, *absent}, policy)
    entries = [_Entry(Candidate(name, "", Fit.UNSUPPORTED, why), math.inf, ()) for name, why in absent.items()]
    for variant in variants.values():
        records = tuple(evidence.get(variant.id, ()))
        verdict = _verdict(manifest, variant, records, doubts.get(variant.id))
        entries += _entries(variant, records, verdict, host, policy)
    entries = _ranked(entries)
    candidates = tuple(entry.candidate for entry in entries)
    chosen = next((candidate for candidate in candidates if candidate.can_open), None)
    measured_at = shape_text(recorded_shapes(manifest.signature)[1])
    return _without_silent_fallback(Decision(host, policy, candidates, chosen, measured_at=measured_at), entries)


def decide_bundle(bundle: Bundle, host: Fingerprint, policy: Policy | None = None) -> Decision:
    """Like :func:`decide` for everything that a bundle's records say, also of variants that it lacks."""
    evidence = {variant_id: bundle.evidence(variant_id) for variant_id in bundle.variants}
    doubts = {variant_id: why for variant_id in bundle.variants if (why := bundle.doubt(variant_id))}
    return decide(bundle.manifest, bundle.variants, evidence, host, policy, absent=bundle.absent, doubts=doubts)


def _check_names(variants: Collection[str], policy: Policy) -> None:
    if policy.variant is not None and policy.variant not in variants:
        raise InvalidInputError(
            f"Unknown variant {shown(policy.variant)}{policy.origin('variant')}. "
            f"This model has: {', '.join(sorted(variants))}."
        )
    if policy.runtime is not None:
        try:
            RUNTIMES.get(policy.runtime)
        except InvalidInputError as error:  # it lists what exists
            raise InvalidInputError(f"{error}{policy.origin('runtime')}") from None


@dataclass(frozen=True)
class _Entry:
    """A candidate with what ranks it."""

    candidate: Candidate
    tier: float
    order: tuple[int, ...]
    bits: int = 0


def _entries(
    variant: Variant, records: tuple[Evidence, ...], verdict: str | None, host: Fingerprint, policy: Policy
) -> list[_Entry]:
    """Return a variant's candidates: one per runtime that opens its format."""
    runtimes = [cls() for cls in RUNTIMES if variant.format in cls.formats]
    if not runtimes:
        lost = _candidate(variant, "", Compat(Fit.UNSUPPORTED, f"no runtime opens the format '{variant.format}'"))
        return [_Entry(lost, math.inf, ())]
    entries = []
    for runtime in runtimes:
        refused = _refused(variant, verdict, policy, runtime)
        missing = None if refused else runtime.missing()
        compat = refused or (Compat(Fit.UNSUPPORTED, missing) if missing else runtime.probe(host, variant))
        lacking = not refused and (runtime.tier > 0 or host.gpu is not None) and bool(missing or compat.outdated)
        latency = measured_latency(records, host, runtime.name)
        candidate = replace(_candidate(variant, runtime.name, compat), latency_ms=latency, lacking=lacking)
        order = (_FIT_ORDER[compat.fit], runtime.preference, variant.precision.bits)
        entries.append(_Entry(candidate, runtime.tier, order, variant.precision.bits))
    return entries


def _ranked(entries: list[_Entry]) -> list[_Entry]:
    """Sort: what can be opened first, by tier, then by latency measured here.

    What was not measured here comes before what was only if it would by its order (fit, preference, precision) come
    before the fastest of those: figures of some are no reason to prefer them to a better kind of variant, and a
    variant that nobody has timed is none to give up the fastest one for.
    """
    best: dict[float, _Entry] = {}
    for entry in entries:
        latency = entry.candidate.latency_ms
        if entry.candidate.can_open and latency is not None:
            fastest = best.setdefault(entry.tier, entry).candidate.latency_ms
            if fastest is not None and latency < fastest:
                best[entry.tier] = entry
    first = {tier: _among_equals(entries, entry) for tier, entry in best.items()}

    def key(entry: _Entry) -> tuple[Any, ...]:
        candidate, fastest = entry.candidate, best.get(entry.tier)
        if candidate.latency_ms is not None:
            place: tuple[Any, ...] = (1, entry is not first.get(entry.tier), candidate.latency_ms)
        else:
            place = (0 if fastest is None or entry.order < fastest.order else 2, *entry.order)
        return (not candidate.can_open, entry.tier, place, candidate.variant)

    return sorted(entries, key=key)


def _among_equals(entries: list[_Entry], fastest: _Entry) -> _Entry:
    """Return the most precise of those that are as fast as the fastest, but for what a measurement may be off."""
    limit = (fastest.candidate.latency_ms or 0.0) * _NOISE
    equal = [
        entry
        for entry in entries
        if entry.tier == fastest.tier and entry.candidate.can_open and (entry.candidate.latency_ms or math.inf) <= limit
    ]
    return max(equal, key=lambda entry: (entry.bits, -(entry.candidate.latency_ms or 0.0)))


def _without_silent_fallback(decision: Decision, entries: list[_Entry]) -> Decision:
    """Name what would be served if this host had the software for it; under ``strict`` serve nothing instead."""
    chosen = next((entry for entry in entries if entry.candidate is decision.chosen), None)
    better = [
        entry.candidate
        for entry in entries
        if entry.candidate.lacking and (chosen is None or entry.tier < chosen.tier or _fits_better(entry, chosen))
    ]
    failures = tuple(f"{candidate.variant} on {candidate.runtime}: {candidate.reason}" for candidate in better)
    if failures and decision.policy.strict:
        return replace(decision, chosen=None, failures=failures)
    return replace(decision, failures=failures)


def _fits_better(entry: _Entry, chosen: _Entry) -> bool:
    """Whether what lacks software would have come first in its tier; it has no fit to compare."""
    return entry.tier == chosen.tier and entry.order[1:] < chosen.order[1:]


def _candidate(variant: Variant, runtime: str, compat: Compat) -> Candidate:
    return Candidate(variant.id, runtime, compat.fit, compat.reason, variant.precision.name, variant.size)


def _verdict(manifest: Manifest, variant: Variant, records: Iterable[Evidence], doubt: str | None) -> str | None:
    """Return why a variant's evidence forbids that it serves, or None."""
    accuracy = latest_accuracy(records)
    if accuracy is not None and not accuracy.passed:
        return f"{accuracy.verdict}: {'; '.join(accuracy.violations)}"
    if variant.id == manifest.reference:
        return None
    if doubt is not None:
        return f"its accuracy evidence cannot be read here: {doubt}"
    return "no accuracy evidence yet" if accuracy is None else None


def _refused(variant: Variant, verdict: str | None, policy: Policy, runtime: Runtime) -> Compat | None:
    """Return why a variant may not serve before its runtime is even asked, or None."""
    why = verdict
    if why is None and variant.dropped:
        why = "its files were not kept"
    elif why is None and policy.variant not in (None, variant.id):
        why = f"variant '{policy.variant}' is forced"
    elif why is None and policy.runtime not in (None, runtime.name):
        why = f"runtime '{policy.runtime}' is forced"
    return Compat(Fit.UNSUPPORTED, why) if why else None
