"""What the commands share: errors as messages, the choice of a variant, a bundle's records without its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_tdeploy.core.errors import TDeployError

if TYPE_CHECKING:
    from mlflow_tdeploy.runtime.select import Decision
    from mlflow_tdeploy.store.bundle import Bundle

F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Print what a user can mend as one message; everything else keeps its traceback."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (TDeployError, MlflowException) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:  # a server that cannot be reached, a file that cannot be read
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


def policy_options(command: F) -> F:
    for option in (
        click.option("--variant", help="Insist on this variant; '' lifts what was saved with the model."),
        click.option("--runtime", help="Insist on this runtime; '' lifts what was saved with the model."),
        click.option("--strict", is_flag=True, help="Never fall back to another variant."),
    ):
        command = option(command)
    return command


def open_records(uri: str) -> tuple[Bundle, Callable[[str], None]]:
    """Return a bundle's records, and a function that brings the files of one of its variants."""
    from mlflow_tdeploy.registry_io import fetch_variant, fetch_view, locate
    from mlflow_tdeploy.store.bundle import Bundle

    location = locate(uri)
    if location.local is not None:
        return Bundle.open(location.local), lambda variant_id: None
    bundle = fetch_view(location)
    return bundle, lambda variant_id: fetch_variant(location, bundle, bundle.variants[variant_id])


def decide(bundle: Bundle, variant: str | None, runtime: str | None, strict: bool) -> Decision:
    from mlflow_tdeploy.flavor.config import policy_of
    from mlflow_tdeploy.runtime import probe
    from mlflow_tdeploy.runtime.select import decide_bundle

    policy = policy_of(bundle, {"variant": variant, "runtime": runtime, "strict": strict or None})
    return decide_bundle(bundle, probe.host(), policy)
