"""Large channels of activations are taken over into the weights, so that eight bits tell the small ones apart.

One scale for all activations of a run is as coarse as the largest of them needs it. ``x @ w`` is the same as
``(x / s) @ (s * w)`` for any positive ``s`` of each channel, and the weights have a scale for each of their columns
anyway (SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438). Where what comes in is used elsewhere, too,
as after the norms of BERT, or comes from an activation function, the division cannot be part of what is before: it is
an operator of its own, which costs little beside the product.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from mlflow_tdeploy.build.graphs import save_ir
from mlflow_tdeploy.build.observe import Floats, Seen, by_channel, observe
from mlflow_tdeploy.build.quantize import weighted_products
from mlflow_tdeploy.core.tensors import Arrays

#: How much of the activations' range goes over (SmoothQuant's alpha), and up to which quantile of the channels none
#: does: what is small may be large in another text.
_SHARES, _FLOORS = (0.6, 0.7, 0.8, 0.9, 1.0), (0.75, 0.0, 0.5, 0.9)
#: Rows of a batch, and batches, that errors are measured on.
_ROWS, _HELD_OUT = 64, 8
#: Its error has to become so many times smaller: the division costs time.
_WORTH = 1.5
_TINY = 1e-5


@dataclass(frozen=True, eq=False)
class Scale:
    """What the input of some products is divided by.

    Attributes:
        by: One number for each channel.
        gain: How many times smaller the error of these products is with it, on batches that it was not chosen by.
    """

    by: Floats
    gain: float


def choose_scales(path: Path, batches: Sequence[Arrays]) -> dict[str, Scale]:
    """Return by what activations are best divided, for the products that gain by it.

    Half of the batches give the ranges, the error is measured on the other half: a scale that fits some texts too
    well makes it larger. The ranges that are used in the end are those of all batches.

    Args:
        path: A prepared fp32 graph.
        batches: Graph inputs.

    Returns:
        Name of a product → scale of its input; products of one input have one scale.

    Raises:
        BuildError: The graph fails on the data.
    """
    found: dict[str, Scale] = {}
    weights = {name: (source, weight) for name, source, weight in weighted_products(path)}
    sources = list(dict.fromkeys(source for source, _ in weights.values()))
    for source, seen in observe(path, sources, batches, functools.partial(by_channel, most=_ROWS)):
        which = [name for name, (its, _) in weights.items() if its == source]
        weight = np.concatenate([weights[name][1] for name in which], axis=1)
        if len(seen) > 1 and all(one.is_finite for one in seen) and (scale := _best(seen, weight)) is not None:
            found.update(dict.fromkeys(which, scale))
    return found


def _best(seen: Sequence[Seen], weight: Floats) -> Scale | None:
    chosen_by, held_out = seen[::2], seen[1::2][:_HELD_OUT]
    outputs = [one.rows @ weight for one in held_out]
    plain = _error(held_out, outputs, weight, np.ones(len(weight), np.float32))

    def error(share: float, floor: float) -> float:
        return _error(held_out, outputs, weight, _scale(chosen_by, weight, share, floor))

    by_share = {share: error(share, _FLOORS[0]) for share in _SHARES}
    share = min(by_share, key=by_share.__getitem__)
    by_floor = {_FLOORS[0]: by_share[share], **{floor: error(share, floor) for floor in _FLOORS[1:]}}
    floor = min(by_floor, key=by_floor.__getitem__)
    gain = plain / max(by_floor[floor], _TINY)
    return Scale(_scale(seen, weight, share, floor), gain) if gain > _WORTH else None


def _scale(seen: Sequence[Seen], weight: Floats, share: float, floor: float) -> Floats:
    inputs = np.max([np.maximum(-one.low, one.high) for one in seen], axis=0).clip(_TINY)
    by = inputs**share / np.abs(weight).max(axis=1).clip(_TINY) ** (1 - share)
    by = by / np.median(by)
    scale: Floats = np.maximum(by, np.quantile(by, floor)).astype(np.float32)
    return scale


def _error(seen: Sequence[Seen], outputs: Sequence[Floats], weight: Floats, by: Floats) -> float:
    """Return how far the products are off in eight bits, beside their size, on average over batches."""
    quantized = _by_columns(weight * by[:, None])
    off = [
        float(np.linalg.norm(_of_one_range(one, by) @ quantized - output)) / max(float(np.linalg.norm(output)), _TINY)
        for one, output in zip(seen, outputs, strict=True)
    ]
    return float(np.mean(off))


def _by_columns(weight: Floats) -> Floats:
    step = np.abs(weight).max(axis=0, keepdims=True).clip(_TINY * _TINY) / 127
    return np.rint(weight / step) * step


def _of_one_range(seen: Seen, by: Floats) -> Floats:
    """Return rows as ``DynamicQuantizeLinear`` would make them: one range, with 0 in it, for the whole batch."""
    low, high = min(float((seen.low / by).min()), 0.0), max(float((seen.high / by).max()), 0.0)
    step = max((high - low) / 255, _TINY * _TINY)
    zero = round(-low / step)
    rounded: Floats = (np.clip(np.rint(seen.rows / by / step) + zero, 0, 255) - zero) * np.float32(step)
    return rounded


def smooth(src: Path, dst: Path, scales: Mapping[str, Scale]) -> None:
    """Write a graph in which the inputs of some products are divided, and their weights multiplied, by scales.

    Args:
        src: A prepared graph.
        dst: The file to write.
        scales: Name of a product → what its input is divided by; products of one input share it.
    """
    model = onnx.load(src)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(_inputs(model.graph))
    nodes: list[onnx.NodeProto] = []
    divided: dict[str, str] = {}
    for node in model.graph.node:
        if node.name in scales:
            by = scales[node.name].by
            source, weight = node.input[0], weights[node.input[1]]
            if source not in divided:
                divided[source] = f"{source}_smooth"
                factor = numpy_helper.from_array((1 / by).astype(np.float32), f"{source}_smooth_factor")
                model.graph.initializer.append(factor)
                nodes.append(helper.make_node("Mul", [source, factor.name], [divided[source]], f"{source}_smooth"))
            scaled = numpy_helper.to_array(weight) * by[:, None]
            if uses[weight.name] > 1:  # others use it as it is
                weight = model.graph.initializer.add(name=f"{weight.name}_{node.name}")
            weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
            node.input[0], node.input[1] = divided[source], weight.name
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save_ir(ir.from_proto(model), dst, external_data=True)


def _inputs(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _inputs(inner)
