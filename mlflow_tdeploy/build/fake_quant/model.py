"""A copy of a source's model that rounds, from making it to the graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.fake_quant.between import round_between
from mlflow_tdeploy.build.fake_quant.calibrate import Met, observe, set_ranges
from mlflow_tdeploy.build.fake_quant.layers import check_rules, is_known, library, replace_layers
from mlflow_tdeploy.build.fake_quant.options import FakeQuant
from mlflow_tdeploy.build.fake_quant.table import asked, forms, name_layers
from mlflow_tdeploy.build.fake_quant.train import train
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.backends._torch_modules import run_module


class Rounding:
    """A model that rounds.

    Args:
        wrapper: What a source exports: one module around the user's. It stays as it is.
        options: What rounds, and how.
        signature: Of the graph.
        batches: What ranges are found on.

    Attributes:
        layers: What rounds.
        blind: Names of those that nothing is known of, so that they do not.

    Raises:
        MissingDependencyError: pytorch-quantization is not installed.
        InvalidInputError: A rule matches nothing.
        BuildError: There is nothing to quantize, or what it meets is not finite.
    """

    def __init__(
        self, wrapper: torch.nn.Module, options: FakeQuant, signature: Signature, batches: Sequence[Arrays]
    ) -> None:
        library()
        self._wrapper, self._options = copy.deepcopy(wrapper).eval(), options
        self._signature, self._batches = signature, batches
        (self._prefix, self._model), *_ = self._wrapper.named_children()
        self._outputs = [spec.name for spec in signature.outputs]
        self._inputs = [spec.name for spec in signature.inputs]
        known = {name: type(one).__name__ for name, one in self._model.named_modules() if name and is_known(one)}
        between = round_between(self._model, options, lambda: self._run(batches[:1]))
        check_rules(options, {**known, **between.calls})
        self.layers = [*replace_layers(self._model, options), *between.layers]
        if not self.layers:
            raise BuildError("There is nothing to quantize: no layer of this model can be, or none is meant to be.")
        self._met: Mapping[torch.nn.Module, Met] = observe(self.layers, lambda: self._run(batches))
        self.blind: tuple[str, ...] = ()

    def _run(self, batches: Sequence[Arrays]) -> None:
        for feeds in batches:
            run_module(self._wrapper, {name: feeds[name] for name in self._inputs}, self._outputs)

    def calibrate(self, calibrator: str) -> None:
        """Set the ranges that a calibrator finds, where rules name no other one."""
        # of layers that an earlier calibrator has switched off it tells nothing
        found = set_ranges(self.layers, self._met, calibrator)
        self.blind = tuple(dict.fromkeys((*self.blind, *found)))
        if len(self.blind) == len(self.layers):
            raise BuildError("Nothing to quantize by: all inputs of layers are 0 throughout the calibration data.")

    def train(self) -> None:
        """Fine-tune it as the options say."""
        train(self._model, self._options.train, self._options.seed)

    def export(self, example: Arrays, path: Path, opset: int) -> None:
        """Write it as a graph with explicit Q/DQ; the layers' nodes have the layers' names.

        Layers whose results no output takes are none afterwards.
        """
        exported, prefix = path.with_name("exported.onnx"), f"module.{self._prefix}."
        with _in_torchs_operators():
            export_module(self._wrapper, example, self._signature, exported, opset=opset, exporter="torchscript")
        self.layers = name_layers(exported, self.layers, prefix)
        simplify(exported, path)
        name_layers(path, self.layers, prefix)

    def asked(self) -> dict[str, str]:
        """Return the form that each layer is to have in the graph."""
        return asked(self.layers)

    def forms(self, path: Path) -> dict[str, str]:
        """Return the form that each layer has in a graph of it."""
        return forms(path, self.layers)


@contextlib.contextmanager
def _in_torchs_operators() -> Iterator[None]:
    """Have quantizers compute with torch's own fake quantization, which its exporter knows as Q/DQ."""
    quantized, _ = library()
    usual = quantized.TensorQuantizer.use_fb_fake_quant
    quantized.TensorQuantizer.use_fb_fake_quant = True
    try:
        yield
    finally:
        quantized.TensorQuantizer.use_fb_fake_quant = usual
