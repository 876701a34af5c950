"""``tdeploy quantize``: a quantized variant within the budget for a model that is logged already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_tdeploy.cli._common import FILE, clean_errors, data_of, read_lines, show_step


@click.command()
@click.argument("uri")
@click.argument("recipe", default="ort-cpu-int8-mixed")
@click.option("--budget", help="A stricter one than the model's own: 'worst_cosine >= 0.995'.")
@click.option("--on-budget", type=click.Choice(["drop", "raise"]), default="drop", show_default=True)
@click.option("--calibrate", type=FILE, help="Texts to find ranges on, one a line; those to check on by default.")
@click.option("--texts", type=FILE, help="Texts to check on, one a line.")
@click.option(
    "--data", type=FILE, help="Texts and labels to check on: .csv or .tsv with the columns text and label, JSON lines."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to look; 15 by default.")
@click.option("--trials", type=click.IntRange(min=1), help="After so many graphs, look no further.")
def quantize(
    uri: str, recipe: str, budget: str | None, on_budget: Any, calibrate: Path | None, texts: Path | None,
    data: Path | None, minutes: float | None, trials: int | None,
) -> None:  # fmt: skip
    """Quantize the model at URI by RECIPE, check it, and add it to that very version.

    RECIPE is ort-cpu-int8-mixed (the fastest for transformers on CPUs), onnx-int8 (explicit Q/DQ, which TensorRT builds
    engines from), auto (both of them), onnx-int8-torch (the same by pytorch-quantization, of a Hugging Face model) or
    ort-cpu-int4 (the smallest). The products that cost most accuracy are looked for, and as few of them as the budget
    needs are quantized by blocks, in more bits, or not at all.

    By NVIDIA's Model Optimizer: onnx-int8-modelopt, onnx-int8-smoothquant-modelopt, onnx-fp8-modelopt,
    onnx-int4-modelopt, onnx-fp16-modelopt, onnx-bf16-modelopt. Plain: ort-cpu-int8, onnx-fp16.
    """
    from mlflow_tdeploy import extend_model

    with clean_errors():
        found = extend_model(
            uri,
            precisions=[recipe],
            budget=budget,
            on_budget=on_budget,
            calibrate_with=read_lines(calibrate, "--calibrate") if calibrate else None,
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
