"""``tdeploy download``: the files of one variant."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_tdeploy.cli._common import clean_errors


@click.command()
@click.argument("uri")
@click.argument("variant")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write: new, or empty.")
def download(uri: str, variant: str, out: Path) -> None:
    """Write the files of VARIANT of the model at URI to a folder, as they were logged; nothing else is downloaded."""
    from mlflow_tdeploy import download_variant

    with clean_errors():
        click.echo(f"Wrote {download_variant(uri, variant, out)}")
