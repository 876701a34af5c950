"""``tdeploy render``: a model as a Triton repository."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_tdeploy.cli._common import clean_errors


@click.command()
@click.argument("uri")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write: new, or empty.")
@click.option("--name", default="", help="Name that clients call; the registered model's by default.")
@click.option("-C", "--config", "pairs", multiple=True, metavar="KEY=VALUE", help="How it is served; several times.")
@click.option("--config-file", type=click.Path(exists=True, dir_okay=False), help="The same in a YAML file.")
def render(uri: str, out: Path, name: str, pairs: tuple[str, ...], config_file: str | None) -> None:
    """Write the model at URI as a Triton repository: its graph, and the name that clients call in front of it."""
    from mlflow_tdeploy.deploy.choose import choose, served
    from mlflow_tdeploy.deploy.settings import FILE, DeploySettings
    from mlflow_tdeploy.triton import repository

    with clean_errors():
        config = dict(_pair(text) for text in pairs)
        settings = DeploySettings.of({**config, **({FILE: config_file} if config_file else {})})
        what = choose(uri, settings, name=name)
        repository.render(what, out, served(settings, what))
        click.echo(f"variant    {what.about['variant']}: {what.about['decision'].partition(';')[0]}")
        click.echo(f"graph      {out / what.graph_name}")
        click.echo(f"name       {out / what.name}, version {what.version}")


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise click.BadParameter(f"{text!r} is not of the form key=value.", param_hint="-C")
    return name, value
