"""``tdeploy engine``: a TensorRT engine for a model that is logged already."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from mlflow_tdeploy.build.engine_options import FLAGS, LEVELS, MODULES, EngineOptions, EnginePlan
from mlflow_tdeploy.cli._common import ShapeRange, clean_errors, parse_bytes, show_step


@click.command()
@click.argument("uri")
@click.option("--precision", default="fp16", show_default=True, help="Of the model's graph to build from.")
@click.option("--module", type=click.Choice(MODULES), help="tensorrt where there is a GPU, else tensorrt_rtx.")
@click.option("--id", help="Id of the new variant; made of module, precision and GPU by default.")
@click.option(
    "--profile", "profiles", multiple=True,
    help="Ranges of an optimization profile: 'batch=1,1,4 sequence=1,16,64'; several times. The model's by default.",
)  # fmt: skip
@click.option("--flag", "flags", multiple=True, type=click.Choice(FLAGS, case_sensitive=False), help="Several times.")
@click.option("--hardware-compatibility", type=click.Choice(LEVELS), default="NONE", show_default=True)
@click.option("--target", "targets", multiple=True, help="Compute capability to build for (8.6); tensorrt_rtx only.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="5 builds longest; the library's by default.")
@click.option("--workspace", help="Most scratch memory: 4GB. All of the GPU's by default.")
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to read and to write; one of this host's own by default.",
)
@click.option(
    "--plugin", "plugins", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Library with operators that the graph needs; several times.",
)  # fmt: skip
@click.option(
    "--plan", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take this engine as it is instead; needs --id. --precision is its own then.",
)  # fmt: skip
@click.option("--gpu", default="", help="With --plan: name of the GPU it was built on.")
@click.option("--compute-capability", default="", help="With --plan: of that GPU (9.0).")
@click.option("--on-budget", type=click.Choice(["drop", "raise"]), default="drop", show_default=True)
def engine(uri: str, plan: Path | None, on_budget: Any, **given: Any) -> None:
    """Build a TensorRT engine of the model at URI, check it where there is a GPU, and add it to that very version."""
    from mlflow_tdeploy import extend_model

    with clean_errors():
        options = _to_build(**given) if plan is None else _to_take(plan, **given)
        (added,) = extend_model(
            uri, engines=[options], on_budget=on_budget, progress=show_step, builder_progress=_shown_progress()
        )
        click.echo(f"Added {added.id} to {uri}" if added.files else f"{added.id} is over the budget: not kept")


def _to_build(
    profiles: tuple[str, ...], workspace: str | None, gpu: str, compute_capability: str, **given: Any
) -> EngineOptions:
    if gpu or compute_capability:
        raise click.UsageError("--gpu and --compute-capability say where a --plan was built; leave them out.")
    return EngineOptions(
        **given,
        profiles=[_profile(text) for text in profiles] or None,
        workspace=parse_bytes(workspace) if workspace is not None else None,
    )


def _to_take(plan: Path, precision: str, gpu: str, compute_capability: str, **given: Any) -> EnginePlan:
    if given["id"] is None:
        raise click.UsageError("--plan needs --id: the name of the variant that it becomes.")
    building = ("profiles", "workspace", "optimization_level", "timing_cache", "plugins", "module")
    if said := [name for name in building if given[name]]:
        raise click.UsageError(f"--{said[0].replace('_', '-')} is about building: leave it out, or leave out --plan.")
    return EnginePlan(
        plan, given["id"], precision, gpu=gpu, compute_capability=compute_capability,
        **{name: given[name] for name in ("flags", "hardware_compatibility", "targets")},
    )  # fmt: skip


def _profile(text: str) -> dict[str, Any]:
    """Return the ranges in ``batch=1,1,4 sequence=1,16,64``."""
    parts = [ShapeRange().convert(part, None, None) for part in re.split(r"[\s;:]+", text.strip()) if part]
    for name, sizes in parts:
        if not isinstance(sizes, tuple) or len(sizes) != 3:
            raise click.BadParameter(f"'{name}' needs a smallest, a usual and a largest size.", param_hint="--profile")
    return dict(parts)


def _shown_progress() -> Any:
    """Return what shows the builder's phases in one line of a terminal; None where nobody looks."""
    if not sys.stderr.isatty():
        return None

    def show(phase: str, done: int, steps: int) -> None:
        sys.stderr.write(f"\r\x1b[2K{phase} {done}/{steps}" if done < steps else "\r\x1b[2K")
        sys.stderr.flush()

    return show
