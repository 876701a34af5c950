"""The command line, ``tdeploy``: a module for each command."""

from __future__ import annotations

import click

from mlflow_tdeploy.cli.analyze import analyze
from mlflow_tdeploy.cli.apply import apply
from mlflow_tdeploy.cli.bench import bench
from mlflow_tdeploy.cli.cache import cache
from mlflow_tdeploy.cli.doctor import doctor
from mlflow_tdeploy.cli.download import download
from mlflow_tdeploy.cli.engine import engine
from mlflow_tdeploy.cli.log import log
from mlflow_tdeploy.cli.plan import plan
from mlflow_tdeploy.cli.promote import history, promote, rollback, status
from mlflow_tdeploy.cli.quantize import quantize
from mlflow_tdeploy.cli.render import render
from mlflow_tdeploy.cli.report import report
from mlflow_tdeploy.cli.show import explain, inspect
from mlflow_tdeploy.cli.triton import triton
from mlflow_tdeploy.cli.verify import verify
from mlflow_tdeploy.cli.watch import watch


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlflow-tdeploy")
def main() -> None:
    """Log a transformer as a bundle of verified variants; look at bundles; measure them."""


for _command in (
    log, inspect, explain, doctor, bench, analyze, report, quantize, engine, verify, download, render, plan, apply,
    promote, rollback, status, history, watch, cache, triton,
):  # fmt: skip
    main.add_command(_command)
