"""``tdeploy apply``: the servers are made to agree with the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import clean_errors, taken_back_if_ended
from mlflow_tdeploy.cli.plan import FILE, show

if TYPE_CHECKING:
    from mlflow_tdeploy.promotion.apply import Outcome


@click.command()
@FILE
@click.option("--again", is_flag=True, help="Try versions again with which a server went away twice.")
@click.option("--yes", is_flag=True, help="Do not ask before anything changes.")
@click.pass_context
def apply(context: click.Context, file: Path, again: bool, yes: bool) -> None:
    """Show a plan and do it. Ends with 1 where something may not be deployed or has failed."""
    from mlflow_tdeploy.promotion.apply import apply as do
    from mlflow_tdeploy.promotion.ends import forgive
    from mlflow_tdeploy.promotion.look import make_plan
    from mlflow_tdeploy.promotion.spec import Spec

    with clean_errors():
        spec = Spec.read(file)
        plan = make_plan(spec, sparing=not again)
        show(plan)
        if (plan.changes or plan.silent) and not yes:
            click.confirm("Do it?", abort=True)
        if again:
            plan = forgive(plan, spec)
        with taken_back_if_ended():
            done = do(plan, spec, told=show_outcome)
    failed = any(one.state != "done" or one.why for one in done)
    context.exit(1 if failed or plan.refused else 0)


def show_outcome(one: Outcome) -> None:
    """Write what became of a step."""
    place = f"{one.step.target} {one.step.name} at {one.step.server}"
    told = "; ".join(filter(None, (one.why, one.seen)))
    click.echo(f"{one.state:11}{place}: version {one.step.after}, {one.seconds:.1f} s{f': {told}' if told else ''}")
