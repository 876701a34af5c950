"""``tdeploy log``: from a source to a bundle, in MLflow or in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlflow_tdeploy.cli._common import ITEMS, ShapeRange, clean_errors, data_of, listed, read_items, show_step


@click.command()
@click.argument("source")
@click.option(
    "--task",
    help="As transformers' pipelines are called, such as text-classification or image-classification; "
    "sentence-embedding; or tensors. Told from SOURCE where that says it.",
)
@click.option("--name", default="model", show_default=True, help="Name of the logged model.")
@click.option("--register", help="Register under this name.")
@click.option("--alias", help="Give the registered version this alias.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the bundle to this folder instead of MLflow.")
@click.option(
    "--precision",
    "--precisions",
    "precisions",
    multiple=True,
    callback=listed,
    help="fp32, int8, fp16, auto (the fastest within the budget) or a variant id; several times, or with commas.",
)
@click.option(
    "--engine", "--engines", "engines", multiple=True, callback=listed,
    help="Precision of a graph to build a TensorRT engine from, such as fp16; several times, or with commas.",
)  # fmt: skip
@click.option(
    "--shape", "--shapes", "shapes", multiple=True, type=ShapeRange(), help="Range of a dimension; several times."
)
@click.option("--budget", help="For example 'worst_cosine >= 0.98'. The task's own by default.")
@click.option("--on-budget", type=click.Choice(["drop", "raise"]), default="drop", show_default=True)
@click.option("--texts", type=ITEMS, help="Texts to verify on, one a line, or a folder of images.")
@click.option("--data", type=ITEMS, help="What to verify on, with labels, see tdeploy quantize.")
@click.option("--calibrate", type=ITEMS, help="Texts or images to find ranges on; those to verify on by default.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long a recipe looks; 15 by default.")
@click.option("--trials", type=click.IntRange(min=1), help="After so many graphs, a recipe looks no further.")
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False), help="Its folder, where SOURCE has none.")
@click.option("--image-processor", type=click.Path(exists=True, file_okay=False), help="As --tokenizer, of images.")
@click.option("--label", "labels", multiple=True, help="Name of a class; several times, in class order.")
@click.option("--bench", is_flag=True, help="Measure what variants cost on this host, too: see tdeploy report.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="With --bench: of such a host, for prices.")
@click.option("--currency", default="USD", show_default=True, help="Of that price.")
@click.option("--revision", help="Commit of the hub repository; a private one is read with HF_TOKEN.")
def log(source: str, out: Path | None, register: str | None, alias: str | None, name: str, **given: Any) -> None:
    """Turn SOURCE (a folder, a hub id or an .onnx file) into a bundle, in MLflow or in a folder."""
    if out is not None and (register or alias):
        raise click.UsageError("--out writes a folder without MLflow: --register and --alias need MLflow.")
    if alias and not register:
        raise click.UsageError("--alias needs --register: an alias belongs to a registered version.")
    bench = Bench(*(given.pop(name) for name in ("bench", "price_per_hour", "currency")))
    if bench.price_per_hour is not None and not bench.wanted:
        raise click.UsageError("--price-per-hour is of what is measured: add --bench.")
    names = ("texts", "data", "calibrate", "minutes", "trials")
    texts, data, calibrate, minutes, trials = (given.pop(name) for name in names)
    arguments = {
        **given,
        "precisions": given["precisions"] or None,
        "engines": given["engines"] or None,
        "shapes": dict(given["shapes"]) or None,
        "labels": list(given["labels"]) or None,
        "verify_with": data_of(texts, data),
        "calibrate_with": read_items(calibrate, "--calibrate") if calibrate else None,
        "search_seconds": 60 * minutes if minutes else None,
        "search_trials": trials,
        "progress": show_step,
    }
    with clean_errors():
        if out:
            uri = _log_to_folder(source, out, arguments)
        else:
            uri = _log_to_mlflow(source, name, register, alias, arguments)
        if bench.wanted:
            bench.measure(uri, arguments["verify_with"])


@dataclass(frozen=True)
class Bench:
    """Whether to measure what was logged, and what an hour of this host costs; refused before minutes are spent."""

    wanted: bool
    price_per_hour: float | None
    currency: str

    def __post_init__(self) -> None:
        from mlflow_tdeploy.flavor.report.cost import Price

        if self.price_per_hour is not None:
            with clean_errors():
                Price(self.price_per_hour, self.currency)

    def measure(self, uri: str, data: Any) -> None:
        """Measure a model, make its report again, and print its cost cards."""
        from mlflow_tdeploy import report_model

        found = report_model(
            uri, measure=True, data=data, price_per_hour=self.price_per_hour, currency=self.currency,
            progress=lambda what, seconds: click.echo(f"{what:<40}{seconds:7.1f} s", err=True),
        )  # fmt: skip
        click.echo(f"\n{found.table()}\n\nReport: {found.place}")


def _log_to_folder(source: str, out: Path, arguments: dict[str, Any]) -> str:
    from mlflow_tdeploy import save_model

    save_model(source, out, **arguments)
    click.echo(f"Wrote {out}")
    return str(out)


def _log_to_mlflow(source: str, name: str, register: str | None, alias: str | None, arguments: dict[str, Any]) -> str:
    import mlflow

    from mlflow_tdeploy import log_model

    info = log_model(source, name=name, registered_model_name=register, **arguments)
    click.echo(f"Logged {info.model_uri}")
    if register:
        click.echo(f"Registered models:/{register}/{info.registered_model_version}")
    if register and alias:
        mlflow.MlflowClient().set_registered_model_alias(register, alias, str(info.registered_model_version))
        click.echo(f"Alias models:/{register}@{alias}")
    return str(info.model_uri)
