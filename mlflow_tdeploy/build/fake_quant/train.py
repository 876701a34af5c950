"""Quantization-aware fine-tuning: whoever wrote the model's training trains a copy of it that rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mlflow_tdeploy.core.errors import BuildError, InvalidInputError


def train(model: torch.nn.Module, how: Any, seed: int) -> None:
    """Train a model that rounds.

    Args:
        model: The model, ranges set; it is changed, and is on the CPU in evaluation mode afterwards.
        how: A function that is called with it, or a Trainer.
        seed: Of torch's random numbers; those of the process stay as they were.

    Raises:
        InvalidInputError: The Trainer has trained already.
        BuildError: Weights are not finite afterwards.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        if hasattr(how, "train"):
            with _training(how, model):
                how.train()
        else:
            how(model)
    model.cpu().eval()
    lost = [name for name, one in model.named_parameters() if not torch.isfinite(one).all()]
    if lost:
        raise BuildError(
            f"Fine-tuning diverged: {len(lost)} weights are not finite, '{lost[0]}' among them. Lower the learning "
            f"rate (a tenth of the usual one, or less, is common for quantization-aware training), or clip gradients."
        )


@contextmanager
def _training(trainer: Any, model: torch.nn.Module) -> Iterator[None]:
    """Let a Trainer train another model than its own for as long as the block takes."""
    if getattr(trainer, "optimizer", None) is not None:
        raise InvalidInputError(
            "The Trainer has an optimizer for the model itself, which would train that one. Give a new Trainer that "
            "makes its own."
        )
    own = {name: getattr(trainer, name) for name in ("model", "model_wrapped")}
    try:
        for name in own:
            setattr(trainer, name, model.to(trainer.args.device))
        yield
    finally:
        for name, value in own.items():
            setattr(trainer, name, value)
