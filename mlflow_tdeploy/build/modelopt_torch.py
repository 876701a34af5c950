"""NVIDIA's Model Optimizer on torch modules: fake quantization that it smooths and calibrates itself.

https://nvidia.github.io/Model-Optimizer/guides/_pytorch_quantization.html
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlflow_tdeploy.build.explicit import rounded
from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.build.modelopt import library
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.backends._torch_modules import run_module

#: Its configurations, by what methods are called here.
CONFIGURATIONS = {"smoothquant": "INT8_SMOOTHQUANT_CFG", "max": "INT8_DEFAULT_CFG"}
#: By default it rounds what goes into norms, by one range for all channels: nothing is left of a BERT then.
_NO_NORMS = {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False}


def quantized(
    wrapper: torch.nn.Module, method: str, signature: Signature, batches: Sequence[Arrays]
) -> torch.nn.Module:
    """Return a copy of a module whose layers round, with ranges from data.

    Args:
        wrapper: What a source exports. It stays as it is.
        method: A key of :data:`CONFIGURATIONS`.
        signature: Of the graph.
        batches: What ranges, and what goes over into the weights, are found on.

    Raises:
        MissingDependencyError: Model Optimizer is not installed.
    """
    inputs, outputs = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
    with library("modelopt.torch.quantization") as modelopt:
        settings: dict[str, Any] = copy.deepcopy(getattr(modelopt, CONFIGURATIONS[method]))
        settings["quant_cfg"].append(_NO_NORMS)

        def run(module: torch.nn.Module) -> None:
            for feeds in batches:
                run_module(module, {name: feeds[name] for name in inputs}, outputs)

        module: torch.nn.Module = modelopt.quantize(copy.deepcopy(wrapper).eval(), settings, run)
        return module


def export(module: torch.nn.Module, example: Arrays, signature: Signature, path: Path, opset: int) -> None:
    """Write such a module as a graph with Q/DQ."""
    exported = path.with_name("exported.onnx")
    with library("modelopt.torch.quantization"):
        export_module(module, example, signature, exported, opset=opset, exporter="torchscript")
        simplify(exported, path)


def products(path: Path) -> tuple[str, ...]:
    """Return the nodes that take something rounded and compute with it: not those that only turn weights."""
    import onnx

    turned = {node.name for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Transpose"}
    return tuple(name for name in rounded(path) if name not in turned)
