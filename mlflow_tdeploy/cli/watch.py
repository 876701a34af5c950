"""``tdeploy watch``: the registry and the servers are kept equal."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import clean_errors, taken_back_if_ended
from mlflow_tdeploy.cli._logs import log_to_stderr
from mlflow_tdeploy.cli.plan import FILE
from mlflow_tdeploy.core.errors import PromotionError, first_line

if TYPE_CHECKING:
    from mlflow_tdeploy.promotion.specfile import SpecFile

#: What MLflow imports for tables where it is there: a hundred MiB that nobody here needs. Without them it is as
#: mlflow-skinny.
_TABLES = ("pandas", "pyarrow", "scipy")
#: No bars in a log. A registry that is away is asked again at the next look: MLflow's own patience is minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@click.command()
@FILE
@click.option("--interval", type=click.FloatRange(min=0.1), help="Seconds between two looks; 30 by default.")
@click.option("--listen", help="For webhooks, /metrics, /health and the page; 127.0.0.1:9464 by default.")
@click.option("--install-webhook", is_flag=True, help="Have MLflow send events to watch.url: a look at once.")
@click.option("--once", is_flag=True, help="Look once and end, with 1 where something is not as it should be.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Text on a terminal, else JSON lines.")
@click.pass_context
def watch(
    context: click.Context, file: Path, interval: float | None, listen: str | None, install_webhook: bool,
    once: bool, log_format: str | None,
) -> None:  # fmt: skip
    """Keep the servers equal to the registry, until Ctrl-C or SIGTERM.

    It looks every few seconds, and at once when MLflow sends a webhook. What a gate refuses or a server does not take
    is written to the version's tags, and what served before serves on.
    """
    _leave_out_tables()
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    log_to_stderr(log_format or "")
    with clean_errors():
        from mlflow_tdeploy.promotion.specfile import SpecFile

        found = SpecFile(file)
        if once:
            context.exit(_look_once(found))
        _watch(found, interval, listen, install=install_webhook)


def _leave_out_tables() -> None:
    if "mlflow" not in sys.modules:
        for name in _TABLES:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _look_once(file: SpecFile) -> int:
    from mlflow_tdeploy.promotion.watch import Watch

    watching = Watch(file.read, interval=1.0)
    with taken_back_if_ended():
        try:
            watching.look()
            if watching.finish():  # else nobody would say what became of what is tried out
                watching.look()
        finally:
            watching.stop()  # who is interrupted takes back what is tried out
            watching.finish()
    for one in watching.view.standings:
        click.echo(f"{one.state:11}{one.target} {one.name} at {one.server}: {one.serves or 'none'} {one.why}".rstrip())
    if watching.view.error:
        click.echo(watching.view.error, err=True)
    right = all(one.right for one in watching.view.standings)
    return 0 if right and not watching.view.error else 1


def _watch(file: SpecFile, interval: float | None, listen: str | None, *, install: bool) -> None:
    import mlflow
    from mlflow import MlflowClient

    from mlflow_tdeploy.promotion import install as webhooks
    from mlflow_tdeploy.promotion.metrics import Metrics
    from mlflow_tdeploy.promotion.watch import Watch
    from mlflow_tdeploy.promotion.web import make_app, served
    from mlflow_tdeploy.promotion.webhook import Receiver

    said = file.read().watch
    secret = said.secret.get_secret_value()
    watching = Watch(file.read, interval=interval or said.interval, told=lambda event: metrics.decided(event))
    metrics = Metrics(lambda: watching.view)

    def end(number: int, frame: FrameType | None) -> None:
        watching.stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    with served(make_app(watching, Receiver(secret), metrics), listen or said.listen) as url:
        click.echo(f"watching   every {interval or said.interval:g} s; {url} has the page, /metrics, /health, /webhook")
        if install:
            webhooks.require_server(mlflow.get_registry_uri())
            try:
                tried = webhooks.install(MlflowClient(), said.url, secret)
                click.echo(f"webhook    {tried.url}: {'works' if tried.works else f'does not work: {tried.why}'}")
                click.echo(f"           {webhooks.KEY_HINT}")
                watching.hurry(webhooks.UNKNOWN_S if tried.is_new else 0.0)
            except PromotionError as error:  # polling works without
                click.echo(f"webhook    {first_line(error)}")
        watching.run()
    click.echo("ended")
