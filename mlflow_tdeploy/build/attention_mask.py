"""Packed attention that reads the padding mask itself instead of a bias computed from it.

Exporters spell a padding mask as arithmetic: a (batch, heads, query, key) array that is 0 where a token counts and very
negative where it does not. ONNX Runtime's ``Attention`` takes the mask as it is, which drops that arithmetic, and only
so can it be quantized: ``QAttention`` has no bias input, and the quantizer leaves a node with one in fp32. Where
nothing is ever padded (images), the same arithmetic comes to a bias of zeros, which is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

_MASK = "attention_mask"
_BIAS_AT, _MASK_AT = 5, 3
#: Below this a score is gone after softmax, in fp16 too.
_GONE = -1e4
#: (batch, sequence) of the masks that a bias is tried on; both sizes differ, so that axes cannot be mixed up.
_SHAPES = ((1, 7), (3, 5), (4, 9))
#: Of rows, where a bias may be nothing.
_SIZES = (1, 2, 5)


def take_mask_input(model: ir.Model) -> int:
    """Feed the graph's padding mask to packed attention where its bias is exactly that mask; in place.

    Whether it is, is found out by computing the bias for several masks: a causal or relative bias stays as it is. One
    that is zero whatever the inputs are, and however many rows they have, goes.

    Args:
        model: A graph with fused attention.

    Returns:
        How many attention nodes have no bias any more.
    """
    mask = next((value for value in model.graph.inputs if value.name == _MASK), None)
    nodes = [node for node in model.graph if node.op_type == "Attention" and node.domain == "com.microsoft"]
    verdicts: dict[ir.Value, str] = {}
    changed: dict[str, list[ir.Node]] = {"mask": [], "nothing": [], "": []}
    for node in nodes:
        bias = node.inputs[_BIAS_AT] if len(node.inputs) > _BIAS_AT else None
        if bias is None or node.inputs[_MASK_AT] is not None:
            continue
        if bias not in verdicts:
            verdicts[bias] = _verdict(model, bias, mask)
        changed[verdicts[bias]].append(node)
    if mask is not None and changed["mask"]:
        _rewire(model, mask, changed["mask"])
    for node in changed["nothing"]:
        node.replace_input_with(_BIAS_AT, None)
        _drop_equal_sizes(node)
    return len(changed["mask"]) + len(changed["nothing"])


def _verdict(model: ir.Model, bias: ir.Value, mask: ir.Value | None) -> str:
    """Return what a bias comes to: the padding mask, nothing, or something that has to stay (empty)."""
    if mask is not None and mask.dtype is not None and _is_padding(model, bias, mask.dtype):
        return "mask"
    return "nothing" if _is_nothing(model, bias) else ""


def _is_nothing(model: ir.Model, bias: ir.Value) -> bool:
    """Tell whether a bias is zero whatever is asked.

    It takes no more of the inputs than their sizes, of which none is free but the number of rows, and is zero for
    several numbers of these: of a sequence that may be longer than any that is tried, nothing is known (a window).
    """
    cone = _cone(model, bias)
    if cone is None or bias.producer() is None:
        return False
    proto, inputs = cone
    if any(set(node.input) & set(inputs) and node.op_type != "Shape" for node in proto.graph.node):
        return False
    specs = {value.name: value.type.tensor_type for value in proto.graph.input}
    if any(not one.dim_value for spec in specs.values() for one in spec.shape.dim[1:]):
        return False
    try:
        session = _session(proto)
        for size in _SIZES:
            feeds = {name: _zeros(spec, size) for name, spec in specs.items()}
            if np.any(session.run(None, feeds)[0]):
                return False
    except Exception:  # see _is_padding
        return False
    return True


def _zeros(spec: onnx.TypeProto.Tensor, size: int) -> np.ndarray:
    shape = [one.dim_value or size for one in spec.shape.dim]
    return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(spec.elem_type))


def _session(proto: onnx.ModelProto) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rewire(model: ir.Model, mask: ir.Value, nodes: Sequence[ir.Node]) -> None:
    cast = ir.node("Cast", [mask], attributes={"to": ir.DataType.INT32}, name="padding_mask_as_int32")
    cast.outputs[0].name = "padding_mask_as_int32"
    first = next(node for node in model.graph)
    model.graph.insert_before(first, cast)
    for node in nodes:
        node.replace_input_with(_MASK_AT, cast.outputs[0])
        node.replace_input_with(_BIAS_AT, None)
        _drop_equal_sizes(node)


def _drop_equal_sizes(node: ir.Node) -> None:
    """Remove sizes that say what is assumed without them: the quantizer refuses a node that states them."""
    sizes = node.attributes.get("qkv_hidden_sizes")
    if sizes is not None and len(set(sizes.as_ints())) == 1:
        del node.attributes["qkv_hidden_sizes"]


def _is_padding(model: ir.Model, bias: ir.Value, mask_type: ir.DataType) -> bool:
    """Tell whether a bias is 0 at real tokens and very negative at the others, whatever the mask."""
    cone = _cone(model, bias)
    if cone is None:
        return False
    proto, inputs = cone
    if _MASK not in inputs:
        return False
    try:
        session = _session(proto)
        return all(_follows(session, inputs, mask) for mask in _masks(mask_type.numpy()))
    except Exception:  # onnxruntime's classes share no base; a bias that cannot be computed alone stays
        return False


def _follows(session: Any, inputs: Sequence[str], mask: np.ndarray) -> bool:
    # The other inputs give their shapes only: ones and zeros are valid token ids and positions.
    feeds = {name: mask if name == _MASK else np.ones_like(mask) for name in inputs}
    (bias,) = session.run(None, feeds)
    batch, length = mask.shape
    if bias.ndim != 4 or bias.shape[0] not in (1, batch) or bias.shape[3] != length:
        return False
    keep = np.broadcast_to(mask[:, None, None, :].astype(bool), (batch, *bias.shape[1:]))
    bias = np.broadcast_to(bias, keep.shape)
    return bool((bias[keep] == 0).all() and (bias[~keep] <= _GONE).all())


def _masks(dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield padding on the right, padding on the left, and masks with holes; no row is empty."""
    rng = np.random.default_rng(0)
    for batch, length in _SHAPES:
        right = (np.arange(length)[None] < rng.integers(1, length + 1, (batch, 1))).astype(dtype)
        holes = (rng.random((batch, length)) < 0.5).astype(dtype)
        holes[:, length // 2] = 1
        yield from (right, np.ascontiguousarray(right[:, ::-1]), holes)


def _cone(model: ir.Model, value: ir.Value) -> tuple[onnx.ModelProto, list[str]] | None:
    """Return what computes a value as a model of its own, and its inputs; None if it needs large weights."""
    nodes: set[ir.Node] = set()
    inputs: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    queue = [value]
    while queue:
        one = queue.pop()
        producer = one.producer()
        if producer is None:
            (weights if one.const_value is not None else inputs)[str(one.name)] = one
        elif producer not in nodes:
            nodes.add(producer)
            queue += [given for given in producer.inputs if given is not None]
    tensors = [weight.const_value for weight in weights.values() if weight.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) > 2**20:
        return None
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in model.graph if node in nodes],
        "bias",
        [ir.serde.serialize_value(one) for one in inputs.values()],
        [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(weight.const_value.numpy(), name)
            for name, weight in weights.items()
            if weight.const_value is not None
        ],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version or 10), list(inputs)
