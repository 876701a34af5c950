"""``tdeploy triton``: a Triton server on this host, for trying a repository out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import clean_errors

if TYPE_CHECKING:
    from mlflow_tdeploy.triton.background import Running
    from mlflow_tdeploy.triton.listening import Listening

_MODELS = click.option("--model", "models", multiple=True, help="Load only this model; several times. All by default.")


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
@_MODELS
@click.option("--seconds", type=float, help="End after so long; on Ctrl-C by default.")
def run(repository: Path, models: tuple[str, ...], seconds: float | None) -> None:
    """Serve a Triton REPOSITORY on free ports of 127.0.0.1 until Ctrl-C."""
    from mlflow_tdeploy.deploy.at_start import models_at_start
    from mlflow_tdeploy.triton.home import find_server
    from mlflow_tdeploy.triton.local import local_triton

    with clean_errors():
        server, wanted = find_server(), models or tuple(models_at_start(repository))
        with local_triton(repository, models=wanted, server=server) as running:
            _show(server.description, wanted, running)
            running.wait(seconds)


@triton.command()
@click.argument("repository")
@_MODELS
@click.option(
    "--ports",
    nargs=3,
    type=click.IntRange(1, 65535),
    default=None,
    help="For HTTP, gRPC and metrics. 8000 8001 8002 by default, or free ones where one of them is taken.",
)
def start(repository: str, models: tuple[str, ...], ports: tuple[int, int, int] | None) -> None:
    """Start a server that lasts for a REPOSITORY, on 127.0.0.1; the folder is made where there is none.

    Deployments to it need no TRITON_MODEL_REPO: which repository a server of this host has is known.
    """
    from mlflow_tdeploy.deploy.at_start import models_at_start
    from mlflow_tdeploy.store.disk import storage_errors
    from mlflow_tdeploy.triton import background

    with clean_errors():
        folder = _folder_of(repository)
        with storage_errors(f"make '{folder}'"):
            folder.mkdir(parents=True, exist_ok=True)
        empty = not any(entry.is_dir() for entry in folder.iterdir())  # a lease may lie there
        wanted = models or (() if empty else tuple(models_at_start(folder)))
        found = background.start(folder, models=wanted, ports=ports or ())
        _show(found.server, wanted, found.listening)
        click.echo(f"repository {found.repository}")
        click.echo(f"log        {found.log}")
        click.echo(f"deploy to  -t tdeploy://127.0.0.1:{found.http}")
        click.echo(f"end it     tdeploy triton stop --port {found.http}")


def _folder_of(repository: str) -> Path:
    scheme, found, rest = repository.partition("://")
    if found and scheme != "file":
        raise click.BadParameter(
            f"a server of this host serves a folder of it, got an address ({scheme}://…). For an object store start a "
            f"server of your own with --model-repository.",
            param_hint="REPOSITORY",
        )
    return Path(rest if found else repository)


@triton.command()
@click.option("--port", type=int, help="Its port for HTTP; needed where there are several.")
@click.option("--all", "every", is_flag=True, help="All that were started here.")
def stop(port: int | None, every: bool) -> None:
    """End a server that was started to last; its repository stays as it is."""
    from mlflow_tdeploy.triton import background

    with clean_errors():
        for one in background.running() if every else [background.chosen(port)]:
            background.stop(one)
            click.echo(f"stopped    {one.listening.url} ({one.repository})")


@triton.command()
def status() -> None:
    """Show the servers that were started to last, what they have loaded, and those that ended by themselves."""
    from mlflow_tdeploy.triton import background

    with clean_errors():
        found = background.running()
        if not found:
            click.echo("No server was started here.")
        for one in found:
            _show_state(one)


def _show(server: str, models: Sequence[str], where: Listening) -> None:
    click.echo(f"server     {server}")
    click.echo(f"models     {', '.join(models) or 'none yet'}")
    click.echo(f"http       {where.url}")
    click.echo(f"grpc       127.0.0.1:{where.grpc}")
    click.echo(f"metrics    http://127.0.0.1:{where.metrics}/metrics")


def _show_state(one: Running) -> None:
    where = one.listening
    if not one.alive:
        click.echo(f"ended      {where.url} ({one.repository}): {where.last_error() or 'it does not say why'}")
        return
    if where.listens or where.ready:
        entries = where.ask("v2/repository/index", {})
        _show(one.server, sorted({entry["name"] for entry in entries if entry.get("state") == "READY"}), where)
    else:
        click.echo(f"starting   {where.url}")
    click.echo(f"repository {one.repository}")
    click.echo(f"since      {one.since}, process {one.pid}")
