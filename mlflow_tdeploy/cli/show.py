"""``tdeploy inspect`` and ``tdeploy explain``: what a bundle holds, and what this host would serve of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mlflow_tdeploy.cli._common import clean_errors, decide, policy_options
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import OPENED, latest_accuracy
from mlflow_tdeploy.runtime.decision import align

if TYPE_CHECKING:
    from mlflow_tdeploy.store.bundle import Bundle

_PRODUCT = ("product", "form", "why", "closer by smoothing", "off by, alone")
_LAYER = ("name", "type", "outputs", "tactic")


@click.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--products", is_flag=True, help="List what became of each product of its quantized variants.")
@click.option("--layers", is_flag=True, help="List the layers of its TensorRT engines, as a GPU host found them.")
def inspect(uri: str, as_json: bool, products: bool, layers: bool) -> None:
    """Show what a bundle holds: source, signature, variants, evidence. Downloads no weights."""
    from mlflow_tdeploy.registry_io import locate, open_records

    with clean_errors():
        bundle, _ = open_records(locate(uri))
        if as_json:
            click.echo(json.dumps(_bundle_as_dict(bundle), indent=2))
            return
        if layers or products:
            click.echo(_layers(bundle) if layers else _products(bundle))
            return
        manifest = bundle.manifest
        told = (manifest.source.kind, manifest.source.name, manifest.source.architecture)
        source = " ".join(dict.fromkeys(filter(None, told)))  # a module without a name is called by its class
        click.echo(f"task       {manifest.task}")
        click.echo(f"source     {source}{' @ ' + manifest.source.revision if manifest.source.revision else ''}")
        click.echo(f"dims       {'; '.join(map(str, manifest.signature.dims)) or 'none'}")
        click.echo(f"inputs     {', '.join(map(str, manifest.signature.inputs))}")
        click.echo(f"outputs    {', '.join(map(str, manifest.signature.outputs))}")
        click.echo(f"budget     {manifest.budget}, against {manifest.reference}")
        click.echo(f"golden     {len(bundle.golden())} requests\n")
        click.echo(align(_variant_rows(bundle)))


def _products(bundle: Bundle) -> str:
    """Return what became of each product of the variants that were looked for, as was read back from their graphs."""
    tables = []
    for variant in bundle.variants.values():
        settings = variant.precision.settings
        if found := settings.get("products"):
            gains, off = settings.get("smoothed", {}), settings.get("off_alone", {})
            other = settings.get("not_as_asked", {})
            asked = dict.fromkeys(variant.precision.kept, "spared") | {name: f"not {it}" for name, it in other.items()}
            rows = [
                (
                    name, form, asked.get(name, "-"), f"{gains[name]:g} times" if name in gains else "-",
                    f"{off[name]:.2g}" if name in off else "-",
                )
                for name, form in found.items()
            ]  # fmt: skip
            short = ", in a search that was cut short" if settings.get("cut_short") else ""
            title = ": ".join(filter(None, (variant.id, settings.get("searched")))) + short
            tables.append(f"{title}\n{align([_PRODUCT, *rows])}")
    if not tables:
        raise InvalidInputError(
            "No variant of this model says what became of its products: tdeploy quantize URI adds one that does."
        )
    return "\n\n".join(tables)


def _layers(bundle: Bundle) -> str:
    """Return the newest listing of each engine as a table."""
    tables = []
    for variant in bundle.variants.values():
        opened = [record for record in bundle.evidence(variant.id) if record.kind == OPENED]
        newest = max(opened, key=lambda record: record.created, default=None)
        listed = newest.settings.get("layers") if newest else None
        if newest and listed:
            gpu = newest.host.gpu if newest.host else None
            title = f"{variant.id}: {len(listed)} layers, listed on {gpu.name if gpu else 'an unknown GPU'}"
            rows = [tuple(str(layer.get(key, "")) for key in _LAYER) for layer in listed]
            tables.append(f"{title}\n{align([_LAYER, *rows])}")
        elif variant.format == "trt":
            tables.append(f"{variant.id}: not listed yet. A host that can open it does: tdeploy verify URI")
    if not tables:
        raise InvalidInputError("The model has no TensorRT engine, and nothing else has a listing of layers.")
    return "\n\n".join(tables)


def _variant_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    from mlflow_tdeploy.core.tasks import TASKS

    rows: list[tuple[str, ...]] = [("variant", "format", "precision", "MB", "from", "accuracy", "budget")]
    limited, task = [limit.metric for limit in bundle.manifest.budget.limits], bundle.manifest.task
    metrics = dict.fromkeys([*limited, *(TASKS.get(task).quality if task in TASKS else ())])  # a newer version's task
    for variant in bundle.variants.values():
        record = latest_accuracy(bundle.evidence(variant.id))
        figures = [f"{name} {record.metrics[name]:.6g}" for name in metrics if record and name in record.metrics]
        if record is None:
            verdict = "reference" if variant.id == bundle.manifest.reference else "no evidence"
        else:
            verdict = "ok" if record.passed else f"{record.verdict}: {'; '.join(record.violations)}"
        against = record.settings.get("reference", "source") if record else "source"
        if against not in ("source", bundle.manifest.reference):
            verdict += f" (against {against})"
        verdict = bundle.doubt(variant.id) or verdict
        size = f"{variant.size / 1e6:.1f}" if variant.files else "not kept"
        rows.append(
            (variant.id, variant.format, variant.precision.name, size, variant.parent or "-",
             ", ".join(figures) or "-", verdict)
        )  # fmt: skip
    return rows + [(name, "-", "-", "-", "-", "-", why) for name, why in bundle.absent.items()]


def _bundle_as_dict(bundle: Bundle) -> dict[str, Any]:
    from mlflow_tdeploy.core.records import to_plain

    return {
        "manifest": to_plain(bundle.manifest),
        "variants": {name: to_plain(variant) for name, variant in bundle.variants.items()},
        "evidence": {name: to_plain(bundle.evidence(name)) for name in bundle.variants},
        "unreadable": dict(bundle.unreadable),
    }


@click.command()
@click.argument("uri")
@policy_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(uri: str, variant: str | None, runtime: str | None, strict: bool, as_json: bool) -> None:
    """Say which variant this host would serve, and why not each other one. Opens nothing."""
    from mlflow_tdeploy.registry_io import locate, open_records

    with clean_errors():
        decision = decide(open_records(locate(uri))[0], variant, runtime, strict)
        click.echo(
            json.dumps(decision.as_dict(), indent=2) if as_json else f"{decision.host.kind}\n{decision.explain()}"
        )
        if decision.chosen is None:
            raise decision.none_left()
