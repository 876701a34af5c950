"""``tdeploy quantize``: a quantized variant within the budget for a model that is logged already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_tdeploy.cli._common import ITEMS, clean_errors, data_of, read_items, show_step


@click.command()
@click.argument("uri")
@click.argument("recipe", default="ort-cpu-int8-mixed")
@click.option("--budget", help="A stricter one than the model's own: 'worst_cosine >= 0.995'.")
@click.option("--on-budget", type=click.Choice(["drop", "raise"]), default="drop", show_default=True)
@click.option(
    "--calibrate",
    type=ITEMS,
    help="Texts to find ranges on, one a line, or a folder of images; those to check on by default.",
)
@click.option("--calibrate-most", type=click.IntRange(min=1), help="How many of them are drawn; 256 by default.")
@click.option("--calibrate-seed", type=click.IntRange(min=0), help="Of the drawing; 0 by default.")
@click.option("--calibrator", help="How ranges are found: max, percentile, mse or entropy; the closest by default.")
@click.option(
    "--keep",
    multiple=True,
    metavar="NAME",
    help="What stays in fp32: a product as 'tdeploy inspect --products' names it, or a regular expression; repeatable.",
)
@click.option("--texts", type=ITEMS, help="Texts to check on, one a line, or a folder of images.")
@click.option(
    "--data",
    type=ITEMS,
    help="What to check on, with labels: .csv, .tsv or .jsonl with text (or image, the path of a file there) and "
    "label; or a folder that has a folder of images for each class.",
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to look; 15 by default.")
@click.option("--trials", type=click.IntRange(min=1), help="After so many graphs, look no further.")
def quantize(
    uri: str, recipe: str, budget: str | None, on_budget: Any, calibrate: Path | None, calibrate_most: int | None,
    calibrate_seed: int | None, calibrator: str | None, keep: tuple[str, ...], texts: Path | None, data: Path | None,
    minutes: float | None, trials: int | None,
) -> None:  # fmt: skip
    """Quantize the model at URI by RECIPE, check it, and add it to that very version.

    RECIPE is ort-cpu-int8-mixed (the fastest for transformers on CPUs), onnx-int8 (explicit Q/DQ, which TensorRT builds
    engines from), auto (both of them), onnx-int8-torch (the same by pytorch-quantization, of a Hugging Face model) or
    ort-cpu-int4 (the smallest). The products that cost most accuracy are looked for, and as few of them as the budget
    needs are quantized by blocks, in more bits, or not at all.

    By NVIDIA's Model Optimizer: onnx-int8-modelopt, onnx-int8-smoothquant-modelopt, onnx-fp8-modelopt,
    onnx-int4-modelopt, onnx-fp16-modelopt, onnx-bf16-modelopt. Plain: ort-cpu-int8, onnx-fp16.
    """
    from mlflow_tdeploy import CalibrationData, Quantize, extend_model
    from mlflow_tdeploy.build.calibration import MOST

    with clean_errors():
        lines = read_items(calibrate, "--calibrate") if calibrate else None
        _check_bounds(recipe, minutes, trials)
        found = extend_model(
            uri,
            precisions=[Quantize(recipe, calibrator, keep) if calibrator or keep else recipe],
            budget=budget,
            on_budget=on_budget,
            calibrate_with=CalibrationData(lines, calibrate_most or MOST, calibrate_seed or 0),
            verify_with=data_of(texts, data),
            search_seconds=60 * minutes if minutes else None,
            search_trials=trials,
            progress=show_step,
        )
    for added in found:
        if added.files:
            short = " (the search was cut short)" if added.precision.settings.get("cut_short") else ""
            click.echo(f"Added {added.id} to {uri}{short}")
    if refused := [added.id for added in found if not added.files]:
        raise click.ClickException(f"'{refused[0]}' is over the budget: not kept.")


def _check_bounds(recipe: str, minutes: float | None, trials: int | None) -> None:
    """Refuse bounds of a search where nothing is looked for."""
    from mlflow_tdeploy.build.plan import recipes_of
    from mlflow_tdeploy.build.recipes import RECIPES

    if (minutes or trials) and not any(RECIPES.get(one).looks for one in recipes_of(recipe)):
        raise click.UsageError(f"'{recipe}' looks for nothing: leave out --minutes and --trials.")
