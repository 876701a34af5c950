"""What the report says of a model, gathered from its records."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.core.evidence import SERVED, Evidence, latest_accuracy
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.images import pixels
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.flavor.report.cost import Price, by_host, cells, cost_cards, head
from mlflow_tdeploy.runtime.decision import Candidate, Decision
from mlflow_tdeploy.store.bundle import Bundle

#: Characters of a golden request or answer, and how many of a batch.
_MOST_TEXT, _MOST_ITEMS = 320, 4
#: Side of a golden picture.
_SIDE = 96
#: Names of classes that are told.
_MOST_CLASSES = 8
#: Numbers of an array.
_MOST_NUMBERS = 4


@dataclass(frozen=True)
class Told:
    """Something by name."""

    name: str
    value: str


@dataclass(frozen=True)
class Table:
    """Rows of text under names.

    Attributes:
        title: What it is of.
        names: Of its columns.
        rows: Its cells.
    """

    title: str
    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class VariantLine:
    """A variant in the report.

    Attributes:
        id: Its id.
        state: ``good``, ``bad`` or empty.
        verdict: In words.
        figures: What was measured of its accuracy.
        facts: Format, precision, size and the like.
        how: How it was made.
    """

    id: str
    state: str
    verdict: str
    figures: tuple[Told, ...]
    facts: tuple[Told, ...]
    how: str


@dataclass(frozen=True)
class Golden:
    """A golden request: what is asked, with pictures where it has such, and what the original answered."""

    asked: tuple[str, ...]
    pictures: tuple[str, ...]
    answered: tuple[str, ...]


def about(bundle: Bundle, uri: str = "") -> list[Told]:
    """Return what the model is, and where."""
    manifest = bundle.manifest
    source = manifest.source
    where = " @ ".join(filter(None, (source.name, source.revision)))
    found = [
        ("model", uri),
        ("task", manifest.task),
        ("source", f"{source.kind} {where}".strip()),
        ("architecture", source.architecture),
        ("classes", _classes(manifest.task_config.get("labels"))),
        ("images", _prepared(manifest.task_config)),
        ("budget", f"{manifest.budget}, against {manifest.reference}"),
        ("logged", f"{manifest.created[:19].replace('T', ' ')} UTC" if manifest.created else ""),
    ]
    return [Told(name, value) for name, value in found if value]


def _classes(labels: Any) -> str:
    """Return how many classes there are, and the first of them."""
    if not isinstance(labels, (list, tuple)) or not labels:
        return ""
    more = ", …" if len(labels) > _MOST_CLASSES else ""
    return f"{len(labels)}: {', '.join(map(str, labels[:_MOST_CLASSES]))}{more}"


def _prepared(config: Mapping[str, Any]) -> str:
    """Return in words how images are made ready; empty for other models."""
    if "resample" not in config:
        return ""
    size, crop, edge = config.get("size"), config.get("crop"), config.get("shortest_edge")
    told = [f"brought to {size[0]} x {size[1]}"] if size else [f"shorter side brought to {edge}"] if edge else []
    told += [f"the middle {crop[0]} x {crop[1]}"] if crop else []
    told += [f"mean {config['mean']}, std {config['std']}"] if config.get("std") else []
    return ", ".join(told)


def signature(bundle: Bundle) -> list[Table]:
    """Return the model's dimensions and tensors."""
    of = bundle.manifest.signature
    dims = tuple((one.name, str(one.min), str(one.opt), str(one.max)) for one in of.dims)
    tensors = [("input", one) for one in of.inputs] + [("output", one) for one in of.outputs]
    rows = tuple((kind, one.name, one.dtype, " × ".join(map(str, one.shape)) or "one") for kind, one in tensors)
    found = [Table("Tensors", ("", "name", "type", "shape"), rows)]
    return [Table("Dimensions", ("name", "least", "usual", "most"), dims), *found] if dims else found


def variants(bundle: Bundle) -> list[VariantLine]:
    """Return every variant, also those that were not kept or not made."""
    lines = [_line(bundle, variant) for variant in bundle.variants.values()]
    return lines + [VariantLine(name, "bad", why, (), (), "") for name, why in bundle.absent.items()]


def _line(bundle: Bundle, variant: Variant) -> VariantLine:
    record = latest_accuracy(bundle.evidence(variant.id))
    state, verdict = _verdict(bundle, variant, record)
    facts = [
        ("format", variant.format),
        ("precision", variant.precision.name),
        ("for", variant.device),
        ("size", f"{variant.size / 1e6:.1f} MB" if variant.files else "not kept"),
        ("made from", variant.parent or ""),
    ]
    known = [*_figures(bundle, record), *_served_quality(bundle, variant)]
    return VariantLine(
        variant.id, state, verdict, tuple(known), tuple(Told(*one) for one in facts if one[1]), _how(variant)
    )


def _verdict(bundle: Bundle, variant: Variant, record: Evidence | None) -> tuple[str, str]:
    if doubt := bundle.doubt(variant.id):
        return "bad", doubt
    if record is None:
        return ("good", "the original") if variant.id == bundle.manifest.reference else ("", "not verified")
    if record.passed:
        return "good", "within the budget"
    return "bad", f"{record.verdict}: {'; '.join(record.violations)}"


def _figures(bundle: Bundle, record: Evidence | None) -> Iterator[Told]:
    if record is None:
        return
    task = bundle.manifest.task
    quality = TASKS.get(task).quality if task in TASKS else ()
    limited = [limit.metric for limit in bundle.manifest.budget.limits]
    for name in dict.fromkeys((*limited, *quality, "worst_cosine", "mean_cosine")):
        if name in record.metrics:
            yield Told(name, f"{record.metrics[name]:.6g}")
    if record.data is not None:
        yield Told("checked on", f"{record.data.count} item{'s' * (record.data.count != 1)}: {record.data.name}")


def _served_quality(bundle: Bundle, variant: Variant) -> Iterator[Told]:
    """Yield what the newest measurement as it serves says of labels, where it had some."""
    served = [one for one in bundle.evidence(variant.id) if one.kind == SERVED]
    newest = max(served, key=lambda one: one.created, default=None)
    task = bundle.manifest.task
    for name in TASKS.get(task).quality if newest is not None and task in TASKS else ():
        if newest is not None and name in newest.metrics:
            yield Told(f"{name}, as served", f"{newest.metrics[name]:.6g}")


def _how(variant: Variant) -> str:
    """Return a variant's recipe and what of its settings is short enough to be read."""
    settings = {
        name: value
        for name, value in variant.precision.settings.items()
        if isinstance(value, (str, int, float, bool)) and len(str(value)) < _MOST_TEXT // 4
    }
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return ": ".join(filter(None, (variant.precision.recipe, told)))


def costs(bundle: Bundle, price: Price | None) -> list[Table]:
    """Return the cost cards, a table for each kind of host."""
    by = by_host(cost_cards(bundle, price))
    return [Table(host, head(cards, price), tuple(cells(card) for card in cards)) for host, cards in by.items()]


def decision(found: Decision) -> Table:
    """Return what a host chose, and why not each other one."""
    rows = tuple(_candidate(found, one) for one in found.candidates if one.can_open or one.lacking or not one.runtime)
    measured = f"p50 ms of the graph at {found.measured_at}" if found.measured_at else "p50 ms"
    return Table(found.host.kind, ("variant", "runtime", "", measured, "why"), rows)


def _candidate(found: Decision, one: Candidate) -> tuple[str, ...]:
    mark = "serves" if one == found.chosen else one.fit.value
    latency = "-" if one.latency_ms is None else f"{one.latency_ms:.2f}"
    return one.variant, one.runtime or "-", mark, latency, found.why(one)


def golden(bundle: Bundle) -> list[Golden]:
    """Return golden requests as people read them; none where they cannot be read."""
    try:
        requests = bundle.golden()
    except TDeployError:
        return []
    return [_golden(one) for one in requests]


def _golden(request: GoldenRequest) -> Golden:
    asked, answer = request.inputs, request.answer
    if isinstance(asked, Mapping):
        return Golden(_each(asked), (), _each(answer) if isinstance(answer, Mapping) else (_short(answer),))
    items = list(asked)[:_MOST_ITEMS] if isinstance(asked, (list, tuple)) else [asked]
    answers = answer if isinstance(answer, (list, tuple, np.ndarray)) else [answer]
    found = list(answers)[: len(items)]
    pictures = [one for one in items if isinstance(one, (bytes, np.ndarray))]
    texts = [one for one in items if not isinstance(one, (bytes, np.ndarray))]
    return Golden(tuple(map(_short, texts)), tuple(filter(None, map(_picture, pictures))), tuple(map(_short, found)))


def _each(arrays: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}: {_short(value)}" for name, value in arrays.items())


def _short(value: Any) -> str:
    plain = _plain(value)
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        numbers = ", ".join(f"{float(one):.4g}" for one in value.reshape(-1)[:_MOST_NUMBERS])
        more = ", …" if value.size > _MOST_NUMBERS else ""
        return f"{value.dtype} {' × '.join(map(str, value.shape))}: {numbers}{more}"
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _picture(image: Any) -> str:
    """Return a small picture as a ``data:`` URL."""
    try:
        small = pixels(image)
    except TDeployError:  # nothing of the rest is lost for it
        return ""
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
