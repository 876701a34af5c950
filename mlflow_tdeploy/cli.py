"""The command line: ``tdeploy log | inspect | explain | doctor | bench | cache``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_tdeploy.core.errors import InvalidInputError, TDeployError
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.runtime.select import align

if TYPE_CHECKING:
    from mlflow_tdeploy.runtime.bench import BenchRow
    from mlflow_tdeploy.runtime.select import Decision
    from mlflow_tdeploy.store.bundle import Bundle

F = TypeVar("F", bound=Callable[..., Any])

#: Optional packages: what they are for and how to get them.
_OPTIONAL = {
    "onnxruntime": ("serving on the CPU", "pip install 'mlflow-tdeploy[cpu]'"),
    "torch": ("logging models, serving the original", "pip install 'mlflow-tdeploy[build]'"),
    "transformers": ("logging Hugging Face models", "pip install 'mlflow-tdeploy[build]'"),
    "onnxscript": ("export and fusion", "pip install 'mlflow-tdeploy[build]'"),
    "sentence_transformers": ("logging sentence-transformers", "pip install 'mlflow-tdeploy[sentence-transformers]'"),
}
#: How bench measures unless it is told otherwise.
_SPLIT = (
    "text batches split as serving splits them, one thread each; a single batch on one thread "
    "(serving also tries every core for it, and keeps to what is faster)"
)


class _Shape(click.ParamType):
    """``batch=1,8,64``: a dimension and its range."""

    name = "dim=min,opt,max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, _, numbers = str(value).partition("=")
        try:
            sizes = tuple(int(number) for number in numbers.split(","))
        except ValueError:
            self.fail(f"{value!r} is not of the form batch=1,8,64", param, ctx)
        return name.strip(), sizes[0] if len(sizes) == 1 else sizes


@contextlib.contextmanager
def _clean_errors() -> Iterator[None]:
    """Print what a user can mend as one message; everything else keeps its traceback."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (TDeployError, MlflowException) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:  # a server that cannot be reached, a file that cannot be read
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


def _policy_options(command: F) -> F:
    for option in (
        click.option("--variant", help="Insist on this variant; '' lifts what was saved with the model."),
        click.option("--runtime", help="Insist on this runtime; '' lifts what was saved with the model."),
        click.option("--strict", is_flag=True, help="Never fall back to another variant."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlflow-tdeploy")
def main() -> None:
    """Log a transformer as a bundle of verified variants; look at bundles; measure them."""


@main.command()
@click.argument("source")
@click.option("--task", help="sentence-embedding, feature-extraction, text-classification or tensors.")
@click.option("--name", default="model", show_default=True, help="Name of the logged model.")
@click.option("--register", help="Register under this name.")
@click.option("--alias", help="Give the registered version this alias.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the bundle to this folder instead of MLflow.")
@click.option(
    "--precision", "precisions", multiple=True, help="fp32, int8, fp16 or a variant id; several times. All by default."
)
@click.option("--shape", "shapes", multiple=True, type=_Shape(), help="Range of a dimension; several times.")
@click.option("--budget", help="For example 'worst_cosine >= 0.98'. The task's own by default.")
@click.option("--on-budget", type=click.Choice(["drop", "raise"]), default="drop", show_default=True)
@click.option(
    "--texts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Texts to verify on, one a line."
)
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False), help="Its folder, where SOURCE has none.")
@click.option("--label", "labels", multiple=True, help="Name of a class; several times, in class order.")
@click.option("--revision", help="Commit of the hub repository; a private one is read with HF_TOKEN.")
def log(source: str, out: Path | None, register: str | None, alias: str | None, name: str, **given: Any) -> None:
    """Turn SOURCE (a folder, a hub id or an .onnx file) into a bundle, in MLflow or in a folder."""
    if out is not None and (register or alias):
        raise click.UsageError("--out writes a folder without MLflow: --register and --alias need MLflow.")
    if alias and not register:
        raise click.UsageError("--alias needs --register: an alias belongs to a registered version.")
    texts = given.pop("texts")
    arguments = {
        **given,
        "precisions": given["precisions"] or None,
        "shapes": dict(given["shapes"]) or None,
        "labels": list(given["labels"]) or None,
        "verify_with": _lines(texts) if texts else None,
        "progress": lambda step: click.echo(f"{step.name:<28}{step.seconds:7.1f} s  {step.detail}"),
    }
    with _clean_errors():
        _log_to_folder(source, out, arguments) if out else _log_to_mlflow(source, name, register, alias, arguments)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. Convert it first, for "
            f"example with: iconv -f latin1 -t utf-8",
            param_hint="--texts",
        ) from error


def _log_to_folder(source: str, out: Path, arguments: dict[str, Any]) -> None:
    from mlflow_tdeploy import save_model

    save_model(source, out, **arguments)
    click.echo(f"Wrote {out}")


def _log_to_mlflow(source: str, name: str, register: str | None, alias: str | None, arguments: dict[str, Any]) -> None:
    import mlflow

    from mlflow_tdeploy import log_model

    info = log_model(source, name=name, registered_model_name=register, **arguments)
    click.echo(f"Logged {info.model_uri}")
    if register:
        click.echo(f"Registered models:/{register}/{info.registered_model_version}")
    if register and alias:
        mlflow.MlflowClient().set_registered_model_alias(register, alias, str(info.registered_model_version))
        click.echo(f"Alias models:/{register}@{alias}")


def _open_records(uri: str) -> tuple[Bundle, Callable[[str], None]]:
    """Return a bundle's records, and a function that brings the files of one of its variants."""
    from mlflow_tdeploy.registry_io import fetch_variant, fetch_view, locate
    from mlflow_tdeploy.store.bundle import Bundle

    location = locate(uri)
    if location.local is not None:
        return Bundle.open(location.local), lambda variant_id: None
    bundle = fetch_view(location)
    return bundle, lambda variant_id: fetch_variant(location, bundle, bundle.variants[variant_id])


def _decide(bundle: Bundle, variant: str | None, runtime: str | None, strict: bool) -> Decision:
    from mlflow_tdeploy.flavor.config import policy_of
    from mlflow_tdeploy.runtime import probe
    from mlflow_tdeploy.runtime.select import decide_bundle

    policy = policy_of(bundle, {"variant": variant, "runtime": runtime, "strict": strict or None})
    return decide_bundle(bundle, probe.host(), policy)


@main.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(uri: str, as_json: bool) -> None:
    """Show what a bundle holds: source, signature, variants, evidence. Downloads no weights."""
    with _clean_errors():
        bundle, _ = _open_records(uri)
        if as_json:
            click.echo(json.dumps(_bundle_as_dict(bundle), indent=2))
            return
        manifest = bundle.manifest
        source = f"{manifest.source.kind} {manifest.source.name} {manifest.source.architecture}".strip()
        click.echo(f"task       {manifest.task}")
        click.echo(f"source     {source}{' @ ' + manifest.source.revision if manifest.source.revision else ''}")
        click.echo(f"dims       {'; '.join(map(str, manifest.signature.dims)) or 'none'}")
        click.echo(f"inputs     {', '.join(map(str, manifest.signature.inputs))}")
        click.echo(f"outputs    {', '.join(map(str, manifest.signature.outputs))}")
        click.echo(f"budget     {manifest.budget}, against {manifest.reference}")
        click.echo(f"golden     {len(bundle.golden())} requests\n")
        click.echo(align(_variant_rows(bundle)))


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


@main.command()
@click.argument("uri")
@_policy_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(uri: str, variant: str | None, runtime: str | None, strict: bool, as_json: bool) -> None:
    """Say which variant this host would serve, and why not each other one. Opens nothing."""
    with _clean_errors():
        decision = _decide(_open_records(uri)[0], variant, runtime, strict)
        click.echo(
            json.dumps(decision.as_dict(), indent=2) if as_json else f"{decision.host.kind}\n{decision.explain()}"
        )
        if decision.chosen is None:
            raise decision.none_left()


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show this host: fingerprint, runtimes (each exercised in a child process), what is missing and how to get it."""
    report = _examine_host()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    host = report["host"]
    click.echo(f"host       {host['os']}, {host['cpu']}, {host['cores']} cores, {host['memory'] / 2**30:.0f} GiB")
    click.echo(f"features   {' '.join(host['cpu_features']) or 'base'}")
    click.echo(f"gpu        {host.get('gpu', {}).get('name') or report['no_gpu']}")
    click.echo(f"libraries  {', '.join(f'{name} {version}' for name, version in host['software'].items())}\n")
    rows = [("runtime", "works", "what it said"), *((r["name"], r["works"], r["detail"]) for r in report["runtimes"])]
    click.echo(align(rows))
    for conflict in report["conflicts"]:
        click.echo(f"\nconflict: {conflict}")
    if report["missing"]:
        click.echo("\n" + align([("missing", "needed for", "install"), *map(tuple, report["missing"])]))


def _examine_host() -> dict[str, Any]:
    from mlflow_tdeploy.core.records import to_plain
    from mlflow_tdeploy.runtime import probe
    from mlflow_tdeploy.runtime.base import RUNTIMES

    runtimes = []
    for name in RUNTIMES.names():
        lacking = RUNTIMES.get(name)().missing()
        result = None if lacking else probe.self_test(name)
        detail = lacking or (result.output if result and result.ok else result.reason if result else "")
        if result is not None and not result.ok:
            detail += f" (reinstall: {RUNTIMES.get(name).install})"
        runtimes.append({"name": name, "works": "yes" if result and result.ok else "no", "detail": detail})
    missing = [(name, *about) for name, about in _OPTIONAL.items() if importlib.util.find_spec(name) is None]
    tokenizers = probe.run_child("import tokenizers")
    if not tokenizers.ok:
        missing.append(
            ("tokenizers", f"reading texts ({tokenizers.reason})", "pip install --force-reinstall tokenizers")
        )
    return {
        "host": to_plain(probe.host()), "no_gpu": probe.gpu()[1],
        "runtimes": runtimes, "conflicts": _conflicts(), "missing": missing,
    }  # fmt: skip


def _conflicts() -> list[str]:
    """Say which installed distributions overwrite each other's files, and what to do."""
    from mlflow_tdeploy.core.hardware import installed_version
    from mlflow_tdeploy.runtime.base import RUNTIMES

    found = []
    for name in RUNTIMES.names():
        installed = [one for one in RUNTIMES.get(name).distributions if installed_version(one)]
        if len(installed) > 1:
            found.append(
                f"{' and '.join(installed)} overwrite each other's files: pip uninstall -y {' '.join(installed)}, "
                f"then install one of them."
            )
    return found


@main.command()
@click.argument("uri")
@_policy_options
@click.option("--shape", "shapes", multiple=True, help="batch=8,sequence=128; several times. A sweep by default.")
@click.option(
    "--rounds", default=20, show_default=True, type=click.IntRange(min=1), help="Calls of each variant per shape."
)
@click.option(
    "--intra-op-threads", default=0, show_default=True,
    help="Threads inside one operator, each shape in one call; 0 splits text batches as serving does.",
)  # fmt: skip
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to this file too."
)
@click.option("--record", is_flag=True, help="Add the figures to the model, so that hosts of this kind rank by them.")
def bench(
    uri: str, variant: str | None, runtime: str | None, strict: bool,
    shapes: tuple[str, ...], rounds: int, intra_op_threads: int, json_path: Path | None, record: bool,
) -> None:  # fmt: skip
    """Time every variant that can serve here, interleaved, over batch and length; inputs from the signature."""
    from mlflow_tdeploy.runtime.bench import sweep
    from mlflow_tdeploy.runtime.options import SessionOptions

    if record:
        if variant or runtime or strict or shapes or intra_op_threads:
            raise click.UsageError(
                "--record measures every variant, always in the same way: leave the other choices out."
            )
        _record(uri, rounds, json_path)
        return
    with _clean_errors():
        bundle, fetch = _open_records(uri)
        decision = _decide(bundle, variant, runtime, strict)
        if not decision.openable:
            raise decision.none_left()
        for name in {candidate.variant for candidate in decision.openable}:
            fetch(name)
            bundle.verify(bundle.variants[name])
        rows = sweep(
            bundle, decision.openable, shapes=[_parse_shape(shape) for shape in shapes] or None, rounds=rounds,
            options=SessionOptions(intra_op_threads=intra_op_threads),
        )  # fmt: skip
        how = f"each shape in one call on {intra_op_threads} intra-op thread(s)" if intra_op_threads else _SPLIT
        click.echo(f"{decision.host.kind}; ms per call, {how}")
        _show_bench(decision, rows, json_path)


def _record(uri: str, rounds: int, json_path: Path | None) -> None:
    from mlflow_tdeploy.flavor.measure import record_latency

    with _clean_errors():
        decision, rows = record_latency(uri, rounds=rounds)
        click.echo(f"{decision.host.kind}; ms per call, {_SPLIT}; recorded with the model")
        _show_bench(decision, rows, json_path)


def _show_bench(decision: Decision, rows: list[BenchRow], json_path: Path | None) -> None:
    click.echo(_bench_table(rows))
    if json_path:
        document = {"host": decision.host.kind, "rows": [row.as_dict() for row in rows]}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _bench_table(rows: list[BenchRow]) -> str:
    table: list[tuple[str, ...]] = [
        ("shape", "variant", "runtime", "mean", "std", "min", "max", "p50", "p95", "p99", "items/s")
    ]
    for row in rows:
        t = row.timing
        figures = (t.mean_ms, t.std_ms, t.min_ms, t.max_ms, t.p50_ms, t.p95_ms, t.p99_ms)
        shape = ",".join(f"{name}={size}" for name, size in row.shape.items())
        table.append((shape, row.variant, row.runtime, *(f"{x:.2f}" for x in figures), f"{row.throughput:.0f}"))
    return align(table)


@main.command()
@click.option("--prune", "most", help="Remove what was used least recently until this much is left: 0, 500MB, 2GB.")
def cache(most: str | None) -> None:
    """Show how much room downloaded models take on this host, and give some back."""
    from mlflow_tdeploy.store import prune
    from mlflow_tdeploy.store.disk import cache_home

    with _clean_errors():
        if most is not None:
            click.echo(f"freed      {prune.prune(_parse_bytes(most)) / 1e6:.1f} MB")
        found = prune.usage()
        click.echo(f"folder     {cache_home()}")
        click.echo(f"objects    {found.objects / 1e6:.1f} MB")
        click.echo(f"views      {found.views / 1e6:.1f} MB, most of it shared with the objects")
        click.echo(f"total      {found.total / 1e6:.1f} MB")


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if match is None:
        raise InvalidInputError(f"Cannot read the size {text!r}. Write it like 500MB or 2GB; 0 removes everything.")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def _parse_shape(text: str) -> dict[str, int]:
    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InvalidInputError(f"Cannot read the shape {text!r}. Write it like batch=8,sequence=128.") from None


if __name__ == "__main__":
    sys.exit(main())
