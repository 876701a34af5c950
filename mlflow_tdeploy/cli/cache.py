"""``tdeploy cache``: how much room downloaded models take."""

from __future__ import annotations

import click

from mlflow_tdeploy.cli._common import clean_errors, parse_bytes


@click.command()
@click.option("--prune", "most", help="Remove what was used least recently until this much is left: 0, 500MB, 2GB.")
def cache(most: str | None) -> None:
    """Show how much room downloaded models take on this host, and give some back."""
    from mlflow_tdeploy.store import prune
    from mlflow_tdeploy.store.disk import cache_home

    with clean_errors():
        if most is not None:
            click.echo(f"freed      {prune.prune(parse_bytes(most)) / 1e6:.1f} MB")
        found = prune.usage()
        click.echo(f"folder     {cache_home()}")
        click.echo(f"objects    {found.objects / 1e6:.1f} MB")
        click.echo(f"views      {found.views / 1e6:.1f} MB, most of it shared with the objects")
        click.echo(f"engines    {found.engines / 1e6:.1f} MB, built here by ONNX Runtime")
        click.echo(f"total      {found.total / 1e6:.1f} MB")
