"""``tdeploy plan``: what would have to change for the servers to agree with the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import clean_errors
from mlflow_tdeploy.core.records import to_json

if TYPE_CHECKING:
    from mlflow_tdeploy.promotion.plan import Plan, Step

_MB = 1e6
#: Actions of which it is told what is there and what would be.
_MOVING = ("create", "update", "refuse")
FILE = click.option(
    "--file", type=click.Path(dir_okay=False, path_type=Path), default=Path("tdeploy.yaml"), show_default=True
)


@click.command()
@FILE
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def plan(context: click.Context, file: Path, as_json: bool) -> None:
    """Show what would be deployed where, and why; nothing moves. Ends with 1 where something may not be deployed."""
    from mlflow_tdeploy.promotion.look import make_plan
    from mlflow_tdeploy.promotion.spec import Spec

    with clean_errors():
        found = make_plan(Spec.read(file))
        click.echo(to_json(found), nl=False) if as_json else show(found)
    context.exit(1 if found.refused else 0)


def show(found: Plan) -> None:
    """Write a plan for people."""
    for one in found.steps:
        versions = f"{one.before or 'none'} -> {one.after}" if one.action in _MOVING else one.before
        click.echo(f"{one.action:8}{one.target} {one.name} at {one.server}: version {versions or 'none'}")
        _show_step(one)
    if silent := len(found.silent):
        click.echo(f"{silent} deployed and silent: brought back first")
    waiting = len(found.changes)
    click.echo(f"{waiting} to change, {len(found.refused)} refused or unknown, {len(found.steps)} in all")


def _show_step(one: Step) -> None:
    if one.action in _MOVING and one.variants[1]:
        variants = " -> ".join(dict.fromkeys(filter(None, one.variants)))
        click.echo(f"  variant   {variants}, {one.moves / _MB:.1f} MB to send")
    for difference in one.differences:
        click.echo(f"  signature {difference}")
    for name, pair in one.evidence.items():
        before, after = ("-" if value is None else f"{value:.4g}" for value in pair)
        click.echo(f"  evidence  {name}: {before} -> {after}")
    if one.strategy:
        click.echo(f"  strategy  {one.strategy}")
    if one.why:
        click.echo(f"  because   {one.why}")
