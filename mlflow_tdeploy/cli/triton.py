"""``tdeploy triton``: a Triton server on this host, for trying a repository out."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mlflow_tdeploy.cli._common import clean_errors


@click.group()
def triton() -> None:
    """Get and run a Triton server on this host."""


@triton.command()
def install() -> None:
    """Put NVIDIA's server for the CPU, from a wheel, into this host's cache; this environment stays as it is."""
    from mlflow_tdeploy.triton import home

    with clean_errors():
        click.echo(f"Triton is in {home.install()}")
        home.preflight(home.find_server())


@triton.command()
@click.argument("repository", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, help="Load only this model; several times. All by default.")
@click.option("--seconds", type=float, help="End after so long; on Ctrl-C by default.")
def run(repository: Path, models: tuple[str, ...], seconds: float | None) -> None:
    """Serve a Triton REPOSITORY on free ports of 127.0.0.1 until Ctrl-C."""
    from mlflow_tdeploy.build.triton_repository import model_names
    from mlflow_tdeploy.triton.home import find_server
    from mlflow_tdeploy.triton.local import local_triton

    with clean_errors():
        server, wanted = find_server(), models or tuple(model_names(repository))
        with local_triton(repository, models=wanted, server=server) as running:
            click.echo(f"server     {server.description}")
            click.echo(f"models     {', '.join(wanted)}")
            click.echo(f"http       {running.url}")
            click.echo(f"grpc       127.0.0.1:{running.grpc}")
            click.echo(f"metrics    http://127.0.0.1:{running.metrics}/metrics")
            end = None if seconds is None else time.monotonic() + seconds
            try:
                while running.process.poll() is None and (end is None or time.monotonic() < end):
                    time.sleep(0.2)
            except KeyboardInterrupt:
                click.echo("stopping")
            if running.process.poll() is not None:
                raise click.ClickException(f"Triton ended by itself: {running.last_error() or 'it does not say why'}")
