"""What became of a model's layers in its graph: nodes get the names of layers, and are read back by them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from mlflow_tdeploy.build.applied import FP32, STATIC
from mlflow_tdeploy.build.explicit import AGAIN, layer_of
from mlflow_tdeploy.build.fake_quant.layers import POOLS, Replaced

#: Between a parameter and the product that takes it.
_ON_THE_WAY = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Split", "Slice", "Concat", "Identity")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_POOLS = ("AveragePool", "MaxPool", "GlobalAveragePool")
#: Which sides of a product are in eight bits → how that is called.
_FORMS = {(True, True): STATIC, (True, False): "int8 input", (False, True): "int8 weights", (False, False): FP32}
_LOOP = "int8 weights and inputs, computed in fp32"


def name_layers(path: Path, layers: Sequence[Replaced], prefix: str) -> list[Replaced]:
    """Give the nodes of a graph that compute layers the layers' names.

    Args:
        path: A graph as TorchScript writes it: weights have their parameters' names, nodes are named by the modules
            that were called on the way to them; or one in which a simplifier has put other nodes since it was named.
            It is changed.
        layers: The layers.
        prefix: What comes before their names in the graph's, with dots.

    Returns:
        The layers without those whose results no output takes: the graph has none of their weights.
    """
    model = onnx.load(path, load_external_data=False)
    counted: Counter[str] = Counter()
    for node, name in [*_with_weights(model, layers, prefix), *_without_weights(model, layers, prefix)]:
        counted[name] += 1
        node.name = name if counted[name] == 1 else f"{name}{AGAIN}{counted[name]}"
    onnx.save(model, path)
    there = {tensor.name.rpartition(".")[0].removeprefix(prefix) for tensor in model.graph.initializer}
    return [layer for layer in layers if not layer.weights or layer.name in there | set(counted)]


def _made_by(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _with_weights(
    model: onnx.ModelProto, layers: Sequence[Replaced], prefix: str
) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield products with the layers that their weights are of.

    Weights have no name where they are joined before they are rounded, as an LSTM's are, or are not rounded at all:
    then the place tells where that is done.
    """
    made_by, names = _made_by(model), {layer.name for layer in layers if layer.weights}
    loops = _scopes(model, prefix, [layer.name for layer in layers if layer.kind.startswith("LSTM")], below=1)
    places = _scopes(model, prefix, names)
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            parameter, rounded_in = _parameter(node.input[1], made_by)
            name = parameter.removeprefix(prefix).rpartition(".")[0]
            found = name if name in names else loops.get(rounded_in, places.get(_scope(node)))
            if found is not None:
                yield node, found


def _parameter(name: str, made_by: Mapping[str, onnx.NodeProto]) -> tuple[str, tuple[str, ...]]:
    """Return what a weight was before it was rounded, transposed, cut out or joined, and the layer that rounds it."""
    rounded_in: tuple[str, ...] = ()
    while (node := made_by.get(name)) is not None and node.op_type in _ON_THE_WAY:
        name = node.input[0]
        rounded_in = _scope(node)[:-1] if node.op_type == "QuantizeLinear" else rounded_in
    return name, rounded_in


def _without_weights(
    model: onnx.ModelProto, layers: Sequence[Replaced], prefix: str
) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield pools, and products and sums between activations: in the order in which their module computes them."""
    made_by, weights = _made_by(model), {tensor.name for tensor in model.graph.initializer}
    of_modules: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer in layers:
        if layer.kind in POOLS:
            of_modules[layer.name, "Pool"].append(layer.name)
        elif not layer.weights:
            of_modules[layer.name.rpartition(".")[0], layer.kind].append(layer.name)
    scopes = _scopes(model, prefix, {module for module, _ in of_modules})
    seen: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        kind = "Pool" if node.op_type in _POOLS else node.op_type
        if (module := scopes.get(_scope(node))) is None:
            continue
        key = (module, kind)
        if (known := of_modules.get(key)) and _rounds(node, made_by) and not weights & set(node.input):
            yield node, known[seen[key] % len(known)]
            seen[key] += 1


def _rounds(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    sources = (made_by.get(name) for name in node.input[:2])
    return any(one is not None and one.op_type == "DequantizeLinear" for one in sources)


def _scope(node: onnx.NodeProto) -> tuple[str, ...]:
    return tuple(node.name.split("/")[1:-1])


def _scopes(
    model: onnx.ModelProto, prefix: str, modules: Iterable[str], *, below: int = 0
) -> dict[tuple[str, ...], str]:
    """Return which module a scope of the graph is: of the modules around it only those that were called are in it.

    Args:
        model: The graph.
        prefix: What comes before the modules' names.
        modules: Names of modules.
        below: So many steps below them nodes are looked at.
    """
    cut = -below or None
    there = sorted({_scope(node)[:cut] for node in model.graph.node}, key=len)
    found = {}
    for module in sorted(modules, key=len, reverse=True):
        steps = re.sub(r"\.(?=\d+(\.|$))", "/", f"{prefix}{module}".rstrip(".")).split(".")
        steps = [step.replace("/", ".") for step in steps]  # of a list its item is called: layer.0
        fitting = [scope for scope in there if scope and scope[-1] == steps[-1] and _is_part(scope, steps)]
        if fitting:
            found[fitting[-1]] = module
    return found


def _is_part(some: Sequence[str], steps: Sequence[str]) -> bool:
    remaining = iter(steps)
    return all(step in remaining for step in some)


def asked(layers: Iterable[Replaced]) -> dict[str, str]:
    """Return the form that each layer was to have."""
    return {layer.name: _asked(layer) for layer in layers}


def _asked(layer: Replaced) -> str:
    sides = [any(not one._disabled for one in side) for side in (layer.inputs, layer.weights or layer.inputs)]
    if layer.kind.startswith("LSTM"):
        return _LOOP if any(sides) else FP32
    return _FORMS[sides[0], sides[1]]


def forms(path: Path, layers: Iterable[Replaced]) -> dict[str, str]:
    """Return the form of each layer, as it is in a graph whose nodes have the layers' names.

    Of a layer with several nodes the least of them counts; an LSTM's are not told apart.
    """
    model = onnx.load(path, load_external_data=False)
    made_by = _made_by(model)
    nodes: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        nodes[layer_of(node.name)].append(node)
    found = {}
    for layer in layers:
        said = {_form(layer, node, made_by) for node in nodes.get(layer.name, ())}
        found[layer.name] = _least(said) if said else "not there"
    return found


def _form(layer: Replaced, node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> str:
    rounded = [name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input[:2]]
    if layer.kind.startswith("LSTM"):
        return _LOOP
    if layer.kind == "Add" or layer.kind in POOLS:
        return _FORMS[any(rounded), any(rounded)]
    return _FORMS[rounded[0], rounded[1]]


def _least(forms_found: Iterable[str]) -> str:
    order = [FP32, "int8 weights", "int8 input", STATIC, _LOOP]
    return min(forms_found, key=order.index)
