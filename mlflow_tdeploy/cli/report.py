"""``tdeploy report``: a model's page, with what was measured since, and what its variants cost."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlflow_tdeploy.cli._common import ITEMS, clean_errors, data_of


@click.command()
@click.argument("uri")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write to this folder, not to the model.")
@click.option(
    "--measure", is_flag=True, help="Measure every variant that serves here first, and add that to the model."
)
@click.option("--data", type=ITEMS, help="What to ask then, with labels: see tdeploy quantize.")
@click.option("--texts", type=ITEMS, help="What to ask then, without labels, one a line, or a folder of images.")
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), help="Of such a host, for prices of a million requests."
)
@click.option("--currency", default="USD", show_default=True, help="Of the price.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(
    uri: str, out: Path | None, measure: bool, data: Path | None, texts: Path | None, price_per_hour: float | None,
    currency: str, as_json: bool,
) -> None:  # fmt: skip
    """Make the report of the model at URI again: one HTML page, pictures, and a cost card for each variant."""
    from mlflow_tdeploy import report_model

    if (texts or data) and not measure:
        raise click.UsageError("--data and --texts say what to measure with: add --measure.")
    asked = data_of(texts, data)
    with clean_errors():
        found = report_model(
            uri, out=out, measure=measure, data=asked, price_per_hour=price_per_hour, currency=currency,
            progress=lambda what, seconds: click.echo(f"{what:<40}{seconds:7.1f} s", err=True),
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    click.echo(found.table() or "Nothing was measured yet: add --measure.")
    click.echo(f"\nWrote {found.place}")
