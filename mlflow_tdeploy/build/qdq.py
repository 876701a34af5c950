"""Static int8 written out: QuantizeLinear and DequantizeLinear around what is quantized, in standard operators.

One file that ONNX Runtime runs in eight bits and TensorRT builds engines from (explicit quantization,
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html): symmetric, weights by
output channel, activations by tensor, biases and outputs left as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mlflow_tdeploy.build.explicit import pairs
from mlflow_tdeploy.build.graphs import quiet, save_ir
from mlflow_tdeploy.build.quantize import names_of

#: Hint for a session: of pairs that lie apart ONNX Runtime makes one again when it opens a graph, and then runs none of
#: them in eight bits.
APART = {"disabled_optimizers": ["CommonSubexpressionElimination"]}
#: Operators with weights that are quantized.
STATIC_OPS = ("MatMul", "Gemm", "Conv")
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    # a pair for each: who shares one is not run in eight bits by ONNX Runtime, and a residual would be rounded as well
    "DedicatedQDQPair": True,
    # what comes next may need more than eight bits: a residual, a norm, a softmax
    "OpTypesToExcludeOutputQuantization": list(STATIC_OPS),
}


def quantizable(path: Path) -> dict[str, str]:
    """Return the nodes of a prepared graph that have weights and can be quantized: name → name of its input.

    Raises:
        BuildError: Two of them have one name, or one has none.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = list(_quantizable(model))
    return {name: node.input[0] for name, node in zip(names_of(path, nodes), nodes, strict=True)}


def _quantizable(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    weights = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    for node in model.graph.node:
        if node.op_type in STATIC_OPS and node.domain in ("", "ai.onnx") and weights & {*node.input[1:2]}:
            yield node


def quantize_static(
    src: Path, dst: Path, limits: Mapping[str, float], *, nodes: Collection[str], external_data: bool | None = None
) -> None:
    """Write a graph in which some nodes are quantized.

    Args:
        src: A prepared fp32 graph of standard operators.
        dst: The file to write.
        limits: Name of a tensor → the end of its range, for the inputs of these nodes.
        nodes: Names of nodes to quantize.
        external_data: Force (True) or forbid (False) weights beside the graph.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

    if not nodes:
        save_ir(ir.load(src), dst, external_data=external_data)
        return
    known = {name: TensorData(lowest=np.float32(-limit), highest=np.float32(limit)) for name, limit in limits.items()}
    with tempfile.TemporaryDirectory(dir=src.parent) as folder, quiet():
        file, cache = Path(folder) / "model.onnx", Path(folder) / "ranges.json"
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, known), cache)
        quantize(
            src,
            file,
            op_types_to_quantize=list(STATIC_OPS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(nodes),
            use_external_data_format=True,
            extra_options=_OPTIONS,
            calibration_cache_path=cache,
        )
        model = ir.load(file)
        _leave_others_whole(model, nodes)
        save_ir(model, dst, external_data=external_data)


def _leave_others_whole(model: ir.Model, nodes: Collection[str]) -> None:
    """Give who is not quantized the numbers as they were: the quantizer rounds what a lone product takes for all.

    Else the residual around a block of a transformer is in eight bits, which is most of the error.
    """
    for _, last, value in pairs(model.graph):
        for user, index in list(last.outputs[0].uses()):
            if user.name not in nodes:
                user.replace_input_with(index, value)
    passes.RemoveUnusedNodesPass()(model)
