"""``tdeploy verify``: are this model's variants still what they were, on this host?"""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_tdeploy.cli._common import ITEMS, clean_errors, data_of, show_step


@click.command()
@click.argument("uri")
@click.option("--variant", "variants", multiple=True, help="Several times; all that this host can open by default.")
@click.option(
    "--texts",
    type=ITEMS,
    help="Texts to verify on, one a line, or a folder of images.",
)
@click.option("--data", type=ITEMS, help="What to verify on, with labels: see tdeploy quantize.")
def verify(uri: str, variants: tuple[str, ...], texts: Path | None, data: Path | None) -> None:
    """Check variants against the model's original on this host, and add the verdicts to the model.

    The newest verdict counts: a variant that fails here serves nowhere any more. Exits with 1 where one fails.
    """
    from mlflow_tdeploy.flavor.verify import verify_model

    with clean_errors():
        found = verify_model(uri, variants or None, verify_with=data_of(texts, data), progress=show_step)
    for name, record in found.items():
        click.echo(f"{name}: {record.verdict}")
    if failed := [name for name, record in found.items() if not record.passed]:
        raise click.ClickException(f"Over the model's budget here: {', '.join(failed)}.")
