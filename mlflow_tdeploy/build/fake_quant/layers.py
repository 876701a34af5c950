"""Layers of a model become those of pytorch-quantization, which round their inputs and weights.

https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/pytorch-quantization-toolkit/docs/index.html. The
library replaces classes in ``torch.nn`` for the whole process; here layers of one model are, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlflow_tdeploy.build.fake_quant.options import FakeQuant, Layers, Quantizer
from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError

#: Classes that the library has a quantized form of.
KINDS = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LSTM", "LSTMCell",
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
)  # fmt: skip
#: That have no weights.
POOLS = frozenset(kind for kind in KINDS if "Pool" in kind)
_RECURRENT = ("LSTM", "LSTMCell")


@dataclass(frozen=True)
class Replaced:
    """A layer that rounds.

    Attributes:
        name: As the model names it.
        kind: Of its class; ``MatMul`` or ``Add`` of what is between activations.
        rule: How it is quantized.
        inputs: Quantizers of its inputs.
        weights: Of its weights.
    """

    name: str
    kind: str
    rule: Layers
    inputs: tuple[Any, ...]
    weights: tuple[Any, ...] = ()

    def leave(self) -> None:
        """Let everything through as it is."""
        for one in (*self.inputs, *self.weights):
            one.disable()


def library() -> Any:
    """Import pytorch-quantization.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        with _without_warnings():
            from pytorch_quantization import nn as quantized
            from pytorch_quantization.tensor_quant import QuantDescriptor
    except ImportError as error:
        raise MissingDependencyError(
            "pytorch-quantization",
            f"making '{FakeQuant.recipe}'",
            "pip install 'mlflow-tdeploy[pytorch-quantization]'",
        ) from error
    return quantized, QuantDescriptor


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep absl, which the library logs every step of a quantizer by, from taking over the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
        logging.getLogger("absl").setLevel(logging.ERROR)
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def replace_layers(model: torch.nn.Module, options: FakeQuant) -> list[Replaced]:
    """Replace layers of a model by ones that round; their parameters stay the same objects, but those of LSTMs.

    Args:
        model: The model; it is changed.
        options: Which ones, and how.
    """
    done: dict[torch.nn.Module, torch.nn.Module] = {}
    found: list[Replaced] = []
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if not is_known(module) or (rule := options.rule(name, kind)) is None or module is model:
            continue
        new = _quantized(module, rule)
        done[module] = new
        found.append(Replaced(name, kind, rule, *_quantizers(new)))
    for parent in model.modules():
        for name, child in parent.named_children():
            if child in done:
                setattr(parent, name, done[child])
    return found


def is_known(module: torch.nn.Module) -> bool:
    """Tell whether a layer can be replaced: a subclass may compute anything else."""
    kind = type(module).__name__
    return kind in KINDS and type(module) is getattr(torch.nn, kind)


def check_rules(options: FakeQuant, kinds: Mapping[str, str]) -> None:
    """Make sure that every rule is about something.

    Args:
        options: The rules.
        kinds: Name → class of every layer that can be quantized.

    Raises:
        InvalidInputError: One matches nothing.
    """
    for rule in options.layers:
        if not any(rule.matches(name, kind) for name, kind in kinds.items()):
            some = ", ".join(list(dict.fromkeys([*kinds.values(), *kinds]))[:12]) or "none"
            raise InvalidInputError(
                f"No layer matches '{rule.match}'. What can be quantized here, by class or name: {some}"
                f"{', …' if len(kinds) > 12 else ''}."
            )


def _quantized(module: torch.nn.Module, rule: Layers) -> torch.nn.Module:
    library_of, _ = library()
    kind = type(module).__name__
    new: Any
    if kind in _RECURRENT:
        new = _recurrent(getattr(library_of, f"Quant{kind}"), module, rule)
    else:
        made = getattr(library_of, f"Quant{kind}")
        new = made.__new__(made)
        new.__dict__.update({key: value.copy() if isinstance(value, dict) else value
                             for key, value in module.__dict__.items()})  # fmt: skip
        new._fake_quant = True
        new._input_quantizer = quantizer(rule.input)
        if kind not in POOLS:
            new._weight_quantizer = quantizer(rule.weight, output=1 if "Transpose" in kind else 0)
    new.train(module.training)
    return new


def _recurrent(made: Any, module: Any, rule: Layers) -> Any:
    """Return an LSTM that is written as a loop of products: its two weights have one quantizer."""
    if getattr(module, "proj_size", 0):
        raise InvalidInputError("pytorch-quantization has no LSTM with proj_size: leave it out with a rule of its own.")
    settings = {name: getattr(module, name) for name in ("input_size", "hidden_size", "bias")}
    if isinstance(module, torch.nn.LSTM):
        more = ("num_layers", "batch_first", "dropout", "bidirectional")
        settings |= {name: getattr(module, name) for name in more}
    new = made(**settings)
    new.load_state_dict(module.state_dict(), strict=True)
    for name, parameter in module.named_parameters():
        setattr(new, name, parameter)
    one = isinstance(module, torch.nn.LSTMCell)
    for part, how in (("input", rule.input), ("weight", rule.weight)):
        if one:
            setattr(new, f"_{part}_quantizer", quantizer(how))
        else:
            count = len(new._input_quantizers)
            setattr(new, f"_{part}_quantizers", torch.nn.ModuleList(quantizer(how) for _ in range(count)))
    return new


def quantizer(how: Quantizer | None, output: int = 0) -> torch.nn.Module:
    """Return what rounds a tensor.

    Args:
        how: How; None for what lets it through as it is.
        output: The axis of a weight's output channels.

    Raises:
        InvalidInputError: A range for each index of another axis.
    """
    quantized, descriptor = library()
    with _without_warnings():
        if how is None:
            return quantized.TensorQuantizer(descriptor(), disabled=True)
        axis = output if how.axis == "output" else how.axis
        if axis not in (None, output):
            raise InvalidInputError(
                f"Weights have one range (axis=None), or one for each output channel (axis='output', here {output}), "
                f"got axis={axis}: a product adds up all others, so that their scales cannot be taken out of its sum."
            )
        return quantized.TensorQuantizer(descriptor(num_bits=how.bits, axis=axis))


def _quantizers(module: Any) -> tuple[tuple[torch.nn.Module, ...], tuple[torch.nn.Module, ...]]:
    """Return the quantizers of a layer's inputs and of its weights."""
    sides = []
    for side in ("input", "weight"):
        several = getattr(module, f"_{side}_quantizers", None)
        one = getattr(module, f"_{side}_quantizer", None)
        sides.append(tuple(several) if several is not None else (one,) if one is not None else ())
    return sides[0], sides[1]
