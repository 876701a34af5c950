"""``tdeploy analyze``: how good, how fast and how large each variant is, and what it uses, as it serves here."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlflow_tdeploy.cli._common import ITEMS, clean_errors, data_of
from mlflow_tdeploy.core.errors import MissingDependencyError

OUT = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("uri")
@click.option("--data", type=ITEMS, help="Texts and labels, or images: see tdeploy quantize.")
@click.option("--texts", type=ITEMS, help="Texts without labels, one a line, or a folder of images.")
@click.option("--variant", "variants", multiple=True, help="Id of a variant; several times. All by default.")
@click.option(
    "--batch", "batches", multiple=True, default=(1, 32), show_default=True, type=click.IntRange(min=1),
    help="Texts in a request; several times.",
)  # fmt: skip
@click.option("--rounds", default=100, show_default=True, type=click.IntRange(min=1), help="Requests of each size.")
@click.option("--seconds", default=10.0, show_default=True, help="Most time for those of one size and variant.")
@click.option("--json", "json_path", type=OUT, help="Write everything to this file, too.")
@click.option("--plot", "plot_path", type=OUT, help="Draw accuracy against speed: .png or .svg.")
@click.option("--record", is_flag=True, help="Log it to MLflow as well: metrics, table, JSON, picture.")
def analyze(
    uri: str, data: Path | None, texts: Path | None, variants: tuple[str, ...], batches: tuple[int, ...],
    rounds: int, seconds: float, json_path: Path | None, plot_path: Path | None, record: bool,
) -> None:  # fmt: skip
    """Measure the variants of the model at URI as they serve here, from a request to its answer, in turn."""
    from mlflow_tdeploy import analyze_model

    with clean_errors():
        _check(json_path, plot_path)
        found = analyze_model(
            uri,
            data_of(texts, data),
            variants=variants or None,
            batches=batches,
            rounds=rounds,
            seconds=seconds,
            record=record,
            progress=lambda what, took: click.echo(f"{took:6.1f} s  {what}", err=True),
        )
        labels = f", {found.labels} with labels" if found.labels else ""
        click.echo(f"{found.host.kind}; {found.data.count} items ({found.data.name}{labels})")
        click.echo(found.table())
        if found.unmeasured:
            click.echo(f"Energy that is not counted: {found.unmeasured}.")
        if json_path:
            json_path.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        if plot_path:
            found.figure().savefig(plot_path, dpi=110)
        if found.run_id:
            click.echo(f"Recorded as MLflow run {found.run_id}")
        elif record:
            raise click.ClickException("It is not recorded in MLflow; the warning above says why.")


def _check(json_path: Path | None, plot_path: Path | None) -> None:
    """Make sure that files can be written before minutes are spent on what is in them."""
    from mlflow_tdeploy.registry_io.plot import can_draw

    for path in filter(None, (json_path, plot_path)):
        if not path.absolute().parent.is_dir():
            raise click.UsageError(f"There is no folder '{path.parent}' for '{path.name}'.")
    if plot_path is None:
        return
    if plot_path.suffix.lower() not in (".png", ".svg"):
        raise click.UsageError(f"--plot '{plot_path}': name a .png or .svg file.")
    if not can_draw():
        raise MissingDependencyError("matplotlib", "--plot", "pip install matplotlib")
