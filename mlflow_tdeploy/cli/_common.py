"""What the commands share: errors as messages, the choice of a variant, a bundle's records without its weights."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_tdeploy.core.errors import InvalidInputError, TDeployError

if TYPE_CHECKING:
    from types import FrameType

    from mlflow_tdeploy.build.report import Step
    from mlflow_tdeploy.runtime.decision import Decision
    from mlflow_tdeploy.store.bundle import Bundle

F = TypeVar("F", bound=Callable[..., Any])


class ShapeRange(click.ParamType):
    """``batch=1,8,64``: a dimension and its range."""

    name = "dim=min,opt,max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, _, numbers = str(value).partition("=")
        try:
            sizes = tuple(int(number) for number in numbers.split(","))
        except ValueError:
            self.fail(f"{value!r} is not of the form batch=1,8,64", param, ctx)
        return name.strip(), sizes[0] if len(sizes) == 1 else sizes


def listed(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """Return what an option says that is given several times, or with commas between."""
    del ctx, param
    return [one.strip() for text in given for one in text.split(",") if one.strip()]


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
#: A file of texts, or a folder of images.
ITEMS = click.Path(exists=True, path_type=Path)


def parse_bytes(text: str) -> int:
    """Return how many bytes are meant by ``500MB`` or ``2GB``.

    Raises:
        InvalidInputError: It is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if match is None:
        raise InvalidInputError(f"Cannot read the size {text!r}. Write it like 500MB or 2GB.")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def read_lines(path: Path, option: str = "--texts") -> list[str]:
    """Return the lines of a file with texts, named by an option.

    Raises:
        BadParameter: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. Convert it first, for "
            f"example with: iconv -f latin1 -t utf-8",
            param_hint=option,
        ) from error


def data_of(texts: Path | None, data: Path | None) -> Any:
    """Return what to ask a model: ``--texts``, or the table of ``--data``; None for neither.

    Raises:
        UsageError: Both are given.
        BadParameter: A file cannot be read.
    """
    if texts and data:
        raise click.UsageError("--texts and --data both say what to ask: leave one of them out.")
    return read_items(texts) if texts else read_table(data) if data else None


def read_items(path: Path, option: str = "--texts") -> list[Any]:
    """Return the lines of a file, or the images of a folder.

    Raises:
        BadParameter: The file is not UTF-8, or the folder has no images.
    """
    from mlflow_tdeploy.core.labelled import image_files

    if not path.is_dir():
        return list(read_lines(path, option))
    if not (found := image_files(path)):
        raise click.BadParameter(f"'{path}' has no images in it.", param_hint=option)
    return list(found)


def show_step(step: Step) -> None:
    """Print a finished step of a build."""
    click.echo(f"{step.name:<28}{step.seconds:7.1f} s  {step.detail}")


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


def read_table(path: Path) -> dict[str, list[Any]]:
    """Return the texts and labels of a table, as ``verify_with`` takes them."""
    from mlflow_tdeploy.core.labelled import Labelled

    with clean_errors():
        found = Labelled.read(path)
    return {"text": list(found.texts), "label": list(found.labels)}


@contextlib.contextmanager
def taken_back_if_ended() -> Iterator[None]:
    """End a block by SIGTERM as by Ctrl-C: what was begun is taken back. ``timeout`` and cancelled jobs send it.

    The first of them counts. A job that is cancelled gets both, one after the other, and the second one would end what
    takes things back; only who presses Ctrl-C once more is heard.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # nobody may listen any more
            os.write(2, b"Ended by SIGTERM: what was begun is taken back. tdeploy status says how it stands then.\n")
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may listen
        return
    listened = (one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) is not signal.SIG_IGN)
    before = {one: signal.signal(one, end) for one in listened}  # who was started with nohup or & is left alone
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler or signal.SIG_DFL)


def policy_options(command: F) -> F:
    for option in (
        click.option("--variant", help="Insist on this variant; '' lifts what was saved with the model."),
        click.option("--runtime", help="Insist on this runtime; '' lifts what was saved with the model."),
        click.option("--strict", is_flag=True, help="Never fall back to another variant."),
    ):
        command = option(command)
    return command


def decide(bundle: Bundle, variant: str | None, runtime: str | None, strict: bool) -> Decision:
    from mlflow_tdeploy.flavor.config import policy_of
    from mlflow_tdeploy.runtime import probe
    from mlflow_tdeploy.runtime.select import decide_bundle

    policy = policy_of(bundle, {"variant": variant, "runtime": runtime, "strict": strict or None})
    return decide_bundle(bundle, probe.host(), policy)
