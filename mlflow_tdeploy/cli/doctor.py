"""``tdeploy doctor``: what this host is, which runtimes work on it, and what is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from mlflow_tdeploy.cli._common import clean_errors
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.runtime.decision import align

#: What logging needs, why, and how to get it. What serving needs each runtime says itself.
_FOR_LOGGING = {
    "torch": ("logging models", "pip install 'mlflow-tdeploy[build]'"),
    "transformers": ("logging Hugging Face models", "pip install 'mlflow-tdeploy[build]'"),
    "onnxscript": ("export and fusion", "pip install 'mlflow-tdeploy[build]'"),
    "sentence_transformers": ("logging sentence-transformers", "pip install 'mlflow-tdeploy[sentence-transformers]'"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--promotion", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TDEPLOY.YAML",
    help="Look at this instead: registry, servers and repositories answer, MLflow sends webhooks.",
)  # fmt: skip
@click.pass_context
def doctor(context: click.Context, as_json: bool, promotion: Path | None) -> None:
    """Show this host: fingerprint, runtimes (each exercised in a child process), what is missing and how to get it."""
    if promotion:
        context.exit(_examine_promotion(promotion, as_json=as_json))
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
    missing = [(name, *about) for name, about in _FOR_LOGGING.items() if importlib.util.find_spec(name) is None]
    tokenizers = probe.run_child("import tokenizers")
    if not tokenizers.ok:
        missing.append(
            ("tokenizers", f"reading texts ({tokenizers.reason})", "pip install --force-reinstall tokenizers")
        )
    return {
        "host": to_plain(probe.host()), "no_gpu": probe.gpu()[1],
        "runtimes": runtimes, "conflicts": _conflicts(), "missing": missing,
    }  # fmt: skip


def _examine_promotion(file: Path, *, as_json: bool) -> int:
    """Show what of promotion works; return the exit code."""
    from mlflow_tdeploy.promotion.checks import checked
    from mlflow_tdeploy.promotion.spec import Spec

    with clean_errors():
        found = checked(Spec.read(file))
    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        rows = [
            ("checked", "works", "what it said"),
            *((one.what, "yes" if one.works else "no", one.why) for one in found),
        ]
        click.echo(align(rows))
    return 0 if all(one.works for one in found) else 1


def _conflicts() -> list[str]:
    """Say which installed distributions overwrite each other's files, and what to do."""
    from mlflow_tdeploy.core.hardware import installed_version
    from mlflow_tdeploy.runtime.base import RUNTIMES

    found = []
    for runtime in RUNTIMES:
        installed = [one for one in runtime.distributions if runtime.exclusive and installed_version(one)]
        if len(installed) > 1:
            found.append(
                f"{' and '.join(installed)} overwrite each other's files: pip uninstall -y {' '.join(installed)}, "
                f"then install one of them."
            )
    return found
