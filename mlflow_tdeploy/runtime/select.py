"""Which variant serves on a host, on which runtime, and why not the others. Pure: opens nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.evidence import Evidence, latest_accuracy, measured_latency, recorded_shapes, shape_text
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime
from mlflow_tdeploy.runtime.decision import Candidate, Decision
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle

#: Medians of one variant, measured twice, may differ as much: below that, precision decides.
_NOISE = 1.05
_FIT_ORDER = {Fit.OPTIMAL: 0, Fit.USABLE: 1, Fit.REBUILD: 2, Fit.UNSUPPORTED: 3}


def decide(
    manifest: Manifest,
    variants: Mapping[str, Variant],
    evidence: Mapping[str, Iterable[Evidence]],
    host: Fingerprint,
    policy: Policy | None = None,
    *,
    absent: Mapping[str, str] | None = None,
    damaged: Collection[str] = (),
    doubts: Mapping[str, str] | None = None,
    triton: bool = False,
) -> Decision:
    """Rank every variant × runtime on a host.

    Order: GPU before CPU before the reference; then latency measured on this kind of host, shortest first; else fit,
    the runtime's preference and lower precision first. A variant needs a passing accuracy record; the reference needs
    none. A better variant that this host lacks software for, or whose verdict is damaged, is named in ``failures``;
    under ``strict`` nothing is served instead of it, nor beside a damaged record: it might have come first.

    Args:
        manifest: The model.
        variants: Its variants by id.
        evidence: What was measured about each, by id.
        host: The host.
        policy: What the user insists on.
        absent: Why further variants never serve, by id: they were not made, or their records cannot be read.
        damaged: Those of ``absent`` whose records are damaged.
        doubts: Why the newest verdict on a variant cannot be read, by id: it does not serve, unless it is the
            reference, which needs none.
        triton: Whether a Triton server on that host opens it: what is installed here does not count then, and only
            runtimes that have their like there do.

    Raises:
        InvalidInputError: The policy names a variant or runtime that does not exist.
    """
    policy, absent, doubts = policy or Policy(), absent or {}, doubts or {}
    _check_names({*variants, *absent}, policy)
    entries = [_Entry(Candidate(name, "", Fit.UNSUPPORTED, why), math.inf, ()) for name, why in absent.items()]
    for variant in variants.values():
        records = tuple(evidence.get(variant.id, ()))
        doubt = doubts.get(variant.id)
        entries += _entries(manifest, variant, records, host, policy, doubt=doubt, triton=triton)
    entries = _ranked(entries)
    candidates = tuple(entry.candidate for entry in entries)
    chosen = next((candidate for candidate in candidates if candidate.can_open), None)
    measured_at = shape_text(recorded_shapes(manifest.signature)[1])
    lost = () if policy.variant else tuple(f"{name}: {absent[name]}" for name in sorted(damaged))
    return _without_silent_fallback(Decision(host, policy, candidates, chosen, lost, measured_at), entries)


def decide_bundle(
    bundle: Bundle,
    host: Fingerprint,
    policy: Policy | None = None,
    *,
    triton: bool = False,
    budget: Budget | None = None,
) -> Decision:
    """Like :func:`decide` for everything that a bundle's records say, also of variants that it lacks.

    Args:
        bundle: The model.
        host: The host.
        policy: What the user insists on.
        triton: See :func:`decide`.
        budget: What a variant's evidence has to keep besides the model's own budget; the reference keeps any.
    """
    evidence = {variant_id: bundle.evidence(variant_id) for variant_id in bundle.variants}
    over = _over(bundle, evidence, budget) if budget else {}
    doubts = {variant_id: why for variant_id in bundle.variants if (why := bundle.doubt(variant_id))}
    return decide(
        bundle.manifest,
        {name: variant for name, variant in bundle.variants.items() if name not in over},
        evidence,
        host,
        policy,
        absent={**bundle.absent, **over},
        damaged=bundle.damaged,
        doubts=doubts,
        triton=triton,
    )


def _over(bundle: Bundle, evidence: Mapping[str, Iterable[Evidence]], budget: Budget) -> dict[str, str]:
    """Return why variants do not keep a budget, by id; what was not measured is not kept."""
    found = {}
    for name in bundle.variants:
        if name == bundle.manifest.reference:
            continue
        accuracy = latest_accuracy(evidence[name])
        if violations := budget.violations(accuracy.metrics if accuracy else {}):
            found[name] = f"over the deployment's budget: {'; '.join(violations)}"
    return found


def _check_names(variants: Collection[str], policy: Policy) -> None:
    if policy.variant is not None and policy.variant not in variants:
        raise InvalidInputError(
            f"Unknown variant {shown(policy.variant)}{policy.origin('variant')}. "
            f"This model has: {', '.join(sorted(variants))}."
        )
    if policy.runtime is not None:
        try:
            RUNTIMES.get(policy.runtime)
        except InvalidInputError:
            raise InvalidInputError(
                f"Unknown runtime {shown(policy.runtime)}{policy.origin('runtime')}. "
                f"Available: {', '.join(RUNTIMES.names())}."
            ) from None


@dataclass(frozen=True)
class _Entry:
    """A candidate with what ranks it."""

    candidate: Candidate
    tier: float
    order: tuple[int, ...]
    bits: int = 0


def _entries(
    manifest: Manifest,
    variant: Variant,
    records: tuple[Evidence, ...],
    host: Fingerprint,
    policy: Policy,
    *,
    doubt: str | None,
    triton: bool,
) -> list[_Entry]:
    """Return a variant's candidates: one per runtime that opens its format."""
    runtimes = [cls() for cls in RUNTIMES if variant.format in cls.formats and (cls.triton or not triton)]
    if not runtimes:
        where = "nothing in a Triton server" if triton else "no runtime"
        lost = _candidate(variant, "", Compat(Fit.UNSUPPORTED, f"{where} opens the format '{variant.format}'"))
        return [_Entry(lost, math.inf, ())]
    entries = []
    for runtime in runtimes:
        nowhere = runtime.tier == 0 and host.gpu is None  # then that is what is in the way
        verdict = _verdict(manifest, variant, records, doubt, None if nowhere else runtime)
        missing = None if triton else runtime.missing()
        compat, would = _compat(variant, verdict, host, policy, runtime, doubted=doubt is not None, missing=missing)
        lacking = would is not None and (runtime.tier > 0 or host.gpu is not None)
        latency = measured_latency(records, host, runtime.name)
        candidate = replace(_candidate(variant, runtime.name, compat), latency_ms=latency, lacking=lacking)
        order = (_FIT_ORDER[would or compat.fit], runtime.preference, variant.precision.bits)
        entries.append(_Entry(candidate, runtime.tier, order, variant.precision.bits))
    return entries


def _compat(
    variant: Variant,
    verdict: str | None,
    host: Fingerprint,
    policy: Policy,
    runtime: Runtime,
    *,
    doubted: bool,
    missing: str | None,
) -> tuple[Compat, Fit | None]:
    """Return how a variant fits, and how it would if only software of this host, or a damaged verdict, kept it out."""
    refused = _refused(variant, verdict, policy, runtime)
    wanted = policy.variant in (None, variant.id) and policy.runtime in (None, runtime.name)
    if refused and not (doubted and wanted and not variant.dropped):
        return refused, None
    if missing:
        return refused or Compat(Fit.UNSUPPORTED, missing), Fit.OPTIMAL
    found = runtime.probe(host, variant)
    would = found.otherwise or (found.fit if refused and found.can_open else None)
    return refused or found, would


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
    failures = (*decision.failures, *failures)
    if failures and decision.policy.strict:
        return replace(decision, chosen=None, failures=failures)
    return replace(decision, failures=failures)


def _fits_better(entry: _Entry, chosen: _Entry) -> bool:
    """Whether what this host lacks software for would have come first in its tier."""
    if entry.tier != chosen.tier:
        return False
    would, does = entry.candidate.latency_ms, chosen.candidate.latency_ms
    if would is not None and does is not None:
        return would * _NOISE < does
    return entry.order < chosen.order


def _candidate(variant: Variant, runtime: str, compat: Compat) -> Candidate:
    return Candidate(variant.id, runtime, compat.fit, compat.reason, variant.precision.name, variant.size)


def _verdict(
    manifest: Manifest, variant: Variant, records: Iterable[Evidence], doubt: str | None, runtime: Runtime | None
) -> str | None:
    """Return why a variant's evidence forbids that it serves on a runtime, or None.

    A verdict on full precision counts everywhere. One on a graph of lower precision counts on the kind of device it is
    from: a CPU computes fp16 in fp32 with casts around each operator, and hardware differs in how it adds up int8.

    Args:
        manifest: The model.
        variant: The variant.
        records: What was measured about it, anywhere.
        doubt: Why its newest verdict cannot be read.
        runtime: The runtime; None where the host has no such device, whose verdict then says nothing.
    """
    known = list(records)
    if runtime is not None and variant.precision.name not in ("fp64", "fp32"):
        accuracy = latest_accuracy(one for one in known if _tier(one) in (None, runtime.tier))
    else:
        accuracy = latest_accuracy(known)
    if accuracy is not None and not accuracy.passed:
        return f"{accuracy.verdict}: {'; '.join(accuracy.violations)}"
    if variant.id == manifest.reference:
        return None
    if doubt is not None:
        return f"its accuracy evidence cannot be read here: {doubt}"
    if accuracy is not None:
        return None
    if runtime is None or latest_accuracy(known) is None:
        return "no accuracy evidence yet"
    where = {0: "a GPU", 1: "a CPU"}.get(runtime.tier, runtime.name)
    return f"{variant.precision.name} was not verified on {where} yet (tdeploy verify)"


def _tier(record: Evidence) -> int | None:
    """Return the kind of device that evidence is from; None where the record does not say, -1 for an unknown one."""
    name = record.settings.get("runtime")
    if name is None:
        return None
    return RUNTIMES.get(name).tier if isinstance(name, str) and name in RUNTIMES else -1


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
