"""``tdeploy cache``: how much room downloaded models take."""

from __future__ import annotations

import re

import click

from mlflow_tdeploy.cli._common import clean_errors
from mlflow_tdeploy.core.errors import InvalidInputError


@click.command()
@click.option("--prune", "most", help="Remove what was used least recently until this much is left: 0, 500MB, 2GB.")
def cache(most: str | None) -> None:
    """Show how much room downloaded models take on this host, and give some back."""
    from mlflow_tdeploy.store import prune
    from mlflow_tdeploy.store.disk import cache_home

    with clean_errors():
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
