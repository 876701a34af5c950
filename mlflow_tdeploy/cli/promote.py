"""``tdeploy promote``, ``rollback``, ``status``, ``history``: versions, the registry and the servers together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_tdeploy.cli._common import F, clean_errors, taken_back_if_ended
from mlflow_tdeploy.cli.apply import show_outcome
from mlflow_tdeploy.cli.plan import FILE
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.runtime.decision import align

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow_tdeploy.promotion.outcome import Outcome
    from mlflow_tdeploy.promotion.status import Standing

_LABEL = (
    click.option("--alias", default="", help="The alias that says which version is served."),
    click.option("--stage", default="", help="Or the stage."),
)
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")


def _labelled(command: F) -> F:
    for option in _LABEL:
        command = option(command)
    return command


@click.command()
@click.argument("uri")
@_labelled
@FILE
def promote(uri: str, alias: str, stage: str, file: Path) -> None:
    """Give a version an alias (or stage) and have it answer wherever that is served, or leave everything as it was.

    URI: models:/name/version.
    """
    from mlflow_tdeploy.promotion.promote import promote as do
    from mlflow_tdeploy.promotion.spec import Spec

    with clean_errors(), taken_back_if_ended():
        done = do(uri, Spec.read(file), alias=alias, stage=stage, told=show_outcome)
    _say_if_nothing(done, "It answers everywhere already; the registry says so, too.")


@click.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(min=1), help="Which version; the one before by default.")
@_labelled
@FILE
@click.pass_context
def rollback(
    context: click.Context, name: str, version: int | None, alias: str, stage: str, file: Path
) -> None:  # fmt: skip
    """Go back to the version of NAME that answered before, alias or stage included.

    Ends with 1 where a server is left, as it was away.
    """
    from mlflow_tdeploy.promotion.rollback import rollback as do
    from mlflow_tdeploy.promotion.spec import Spec

    with clean_errors(), taken_back_if_ended():
        done = do(name, Spec.read(file), version=version, alias=alias, stage=stage, told=show_outcome)
    context.exit(1 if any(one.state == "left" for one in done) else 0)


@click.command()
@FILE
@_JSON
@click.pass_context
def status(context: click.Context, file: Path, as_json: bool) -> None:
    """Show what should answer and what does, on each server. Ends with 1 where they are not the same."""
    from mlflow_tdeploy.promotion.look import make_plan
    from mlflow_tdeploy.promotion.spec import Spec
    from mlflow_tdeploy.promotion.status import status_of

    with clean_errors():
        found = status_of(make_plan(Spec.read(file)))
    click.echo(to_json(found) if as_json else _table(found), nl=not as_json)
    context.exit(1 if not all(one.right for one in found) else 0)


def _table(found: Sequence[Standing]) -> str:
    rows = [("state", "target", "name", "server", "wants", "serves", "variant", "since", "by")]
    for one in found:
        wants, serves = (str(version or "-") for version in (one.wants, one.serves))
        rows.append((one.state, one.target, one.name, one.server, wants, serves, one.variant, one.since[:19], one.by))
    whys = [f"{one.target} {one.name} at {one.server}: {one.why}" for one in found if one.why]
    return "\n".join([align(rows), *whys])


@click.command()
@click.argument("name")
@click.option("--most", default=20, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@_JSON
def history(name: str, most: int, as_json: bool) -> None:
    """Show who promoted what of the registered model NAME, when and why; the newest first."""
    from mlflow_tdeploy.promotion.history import History

    with clean_errors():
        found = History().of(name, most)
    if as_json:
        click.echo(to_json(found), nl=False)
        return
    for one in found:
        versions = f"{one.before or 'none'} -> {one.version}"
        click.echo(
            f"{one.at[:19]}  {one.decision:11} {one.target} {one.name}: {versions}, {one.seconds:.1f} s, by {one.by} "
            f"({one.trigger})"
        )
        if one.why:
            click.echo(f"{'':21}{one.why}")


def _say_if_nothing(done: Sequence[Outcome], text: str) -> None:
    if not done:
        click.echo(text)
