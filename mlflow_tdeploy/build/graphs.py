"""Functions from ONNX file to ONNX file: simplify, fuse. Half precision is in ``build.half``, int8 in ``quantize``.

None of them changes its source, and none sends a graph through one protobuf message of more than 2 GiB:
large weights are read and written beside the graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript
from onnxscript import optimizer as onnxscript_optimizer

from mlflow_tdeploy.build.attention_mask import take_mask_input
from mlflow_tdeploy.build.exact_rules import exact_rules
from mlflow_tdeploy.core.errors import BuildError

#: Kinds of fusion that :func:`fuse_for_ort` knows, and the operators that each leaves in a graph.
FUSED_OPS: dict[str, tuple[str, ...]] = {
    "attention": ("com.microsoft.Attention", "com.microsoft.MultiHeadAttention", "com.microsoft.GroupQueryAttention"),
    "packed_qkv": ("com.microsoft.Attention",),
    "bias_gelu": ("com.microsoft.BiasGelu",),
    "embed_layer_norm": ("com.microsoft.EmbedLayerNormalization",),
    "gelu": ("com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu"),
    "layer_norm": ("LayerNormalization",),
    "rms_norm": ("SimplifiedLayerNormalization", "RMSNormalization"),
    "rotary_embedding": ("com.microsoft.RotaryEmbedding",),
    "skip_layer_norm": ("com.microsoft.SkipLayerNormalization",),
    "skip_rms_norm": ("com.microsoft.SkipSimplifiedLayerNormalization",),
}
FUSIONS = frozenset(FUSED_OPS)
#: What pays on the CPU. SkipLayerNormalization and BiasGelu run slower there than the operators they replace.
CPU_FUSIONS = FUSIONS - {"skip_layer_norm", "bias_gelu", "embed_layer_norm"}
#: The same where the quantizer would leave packed attention in fp32, which it does when that takes an additive bias.
CPU_INT8_FUSIONS = CPU_FUSIONS - {"packed_qkv"}
#: ONNX Runtime fuses these again when a session opens, unless they are in its ``disabled_optimizers``.
SESSION_OPTIMIZERS: dict[str, str] = {
    "attention": "AttentionFusion",
    "bias_gelu": "BiasGeluFusion",
    "embed_layer_norm": "EmbedLayerNormFusion",
    "skip_layer_norm": "SkipLayerNormFusion",
}

_EXTERNAL_DATA_BYTES = 64 * 2**20
_FOLD_BYTES = 256 * 2**20  # the packed weights of one fused attention are folded up to this size


def save_ir(
    model: ir.Model, path: Path, *, external_data: bool | None = None, threshold: int = _EXTERNAL_DATA_BYTES
) -> None:
    """Write a graph; weights of more than ``threshold`` bytes in all go to ``<path>.data`` beside it.

    What exporters and fusers note about where a node comes from is left out, see :func:`strip_notes`.

    Args:
        model: The graph.
        path: The file to write.
        external_data: Force (True) or forbid (False) the file beside.
        threshold: Total size of the weights that may stay inside.
    """
    strip_notes(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    beside = size > threshold if external_data is None else external_data
    if not beside:
        ir.external_data.load_to_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data" if beside else None, size_threshold_bytes=1024)


def strip_notes(model: ir.Model) -> None:
    """Remove every doc string and metadata property of a graph.

    The exporters write the user's source lines, the names of classes and paths of the machine there: a model that
    is handed on must not carry them, nor be twice as large for them.
    """
    scopes: list[Any] = [model.graph, *model.functions.values()]
    scopes += [graph for scope in scopes for graph in scope.subgraphs()]
    noted: list[Any] = [model, *scopes]
    for scope in scopes:
        for node in scope:
            noted.extend([node, *node.outputs, *node.attributes.values()])
        noted.extend([*scope.inputs, *(scope.initializers.values() if isinstance(scope, ir.Graph) else ())])
    noted.extend(
        [value.const_value for value in noted if isinstance(value, ir.Value) and value.const_value is not None]
    )
    for part in noted:
        if isinstance(part, ir.TensorProtoTensor):  # a view of the message, which is written again as it is
            part.raw.ClearField("doc_string")
            part.raw.ClearField("metadata_props")
        if getattr(part, "doc_string", None):
            part.doc_string = None
        if getattr(part, "metadata_props", None):
            part.metadata_props.clear()


def op_counts(path: Path) -> dict[str, int]:
    """Count operators, most frequent first; a name outside the standard domain carries its domain."""
    graph = onnx.load(path, load_external_data=False).graph
    return dict(
        Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node).most_common()
    )


def opset_and_ir(path: Path) -> tuple[int, int]:
    """Return the version of the standard operators and of the file format."""
    model = onnx.load(path, load_external_data=False)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise BuildError(
            f"{path.name} imports no standard ONNX operators, so it has no opset version. Export it again."
        )
    return int(versions[0]), int(model.ir_version)


def simplify(src: Path, dst: Path) -> bool:
    """Fold constants and drop what no output needs; inputs, outputs and dynamic dimensions stay as they are.

    Returns:
        Whether the graph got smaller. When it did not, ``dst`` holds the source graph unchanged.
    """
    before, model = ir.load(src), ir.load(src)
    with quiet(), exact_rules():
        onnxscript_optimizer.optimize_ir(model, onnx_shape_inference=False)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    changed = model.graph.num_nodes() < before.graph.num_nodes() and _interface(model) == _interface(before)
    save_ir(model if changed else before, dst)
    return changed


def fuse_for_ort(
    src: Path,
    dst: Path,
    *,
    fusions: Collection[str] = CPU_FUSIONS,
    num_heads: int = 0,
    hidden_size: int = 0,
    external_data: bool | None = None,
) -> dict[str, int]:
    """Replace patterns by ONNX Runtime's fused operators, each kind only if it is asked for.

    Two fusers exist, one for graphs of the ``torch.export`` exporter and one for TorchScript graphs of models
    with ``attn_implementation="eager"``, whose attention is always packed. The second is used only where the
    first finds no attention.

    Args:
        src: A portable graph.
        dst: The file to write; it runs on ONNX Runtime only.
        fusions: Kinds out of :data:`FUSIONS`.
        num_heads: Attention heads of the model, which the TorchScript fuser often cannot read from the graph.
        hidden_size: Width of the model, for the same reason.
        external_data: Force (True) or forbid (False) weights beside the graph; a session opens faster with them.

    Returns:
        How many fused operators of each kind the result holds, zeros left out.
    """
    if unknown := set(fusions) - FUSIONS:
        raise BuildError(f"Unknown fusion {min(unknown)!r}. Available: {', '.join(sorted(FUSIONS))}.")
    with quiet(), exact_rules():
        best = _fuse_onnxscript(src, fusions)
        if "attention" in fusions and not _fused(best).get("attention"):
            other = _fuse_transformers(src, fusions, num_heads, hidden_size)
            if _fused(other).get("attention"):
                best = other
        take_mask_input(best)
        # Weights that a fusion packed by Concat must become plain weights: a quantizer sees nothing else.
        onnxscript_optimizer.optimize_ir(best, input_size_limit=_FOLD_BYTES, output_size_limit=_FOLD_BYTES)
    best.opset_imports.setdefault("com.microsoft", 1)
    save_ir(best, dst, external_data=external_data)
    return _fused(best)


def _fuse_onnxscript(src: Path, fusions: Collection[str]) -> ir.Model:
    """Run onnxscript's fusions for ONNX Runtime in their own order, one kind at a time."""
    ort_fusions, steps, rewrite, gemm_to_matmul_add_rule = _onnxscript_fusions()

    if set(fusions) >= FUSIONS:
        return ort_fusions.optimize_for_ort(ir.load(src))[0]
    model = ir.load(src)
    rewrite(model, [gemm_to_matmul_add_rule])
    model = steps._pre_optimize(model)
    plan: list[tuple[str, Any, dict[str, Any]]] = [
        ("gelu", steps.fuse_erfgelu, {}),
        ("rms_norm", steps.fuse_rms_normalization, {}),
        ("skip_layer_norm", steps.fuse_skip_layer_normalization, {}),
        ("skip_rms_norm", steps.fuse_skip_rms_normalization, {}),
        ("rotary_embedding", steps.fuse_rotary_embedding, {}),
        ("rotary_embedding", steps.fuse_cos_sin_cache, {}),
        ("rotary_embedding", steps.fuse_partial_rotary_embedding, {}),
        ("attention", steps.fuse_sdpa, {"apply_shape_inference": True}),
        *(("attention", step, {}) for step in (steps.fuse_gqa, steps.fuse_qkv_gqa, steps.fuse_mha1, steps.fuse_mha2)),
        *(("attention", step, {}) for step in (steps.fuse_mha_scale, steps.fuse_mha_bias)),
        ("packed_qkv", steps.fuse_attention, {}),
        ("gelu", steps.fuse_gelu, {}),
        ("bias_gelu", steps.fuse_bias_gelu, {}),
        ("attention", steps.replace_sdpa_by_mha, {}),
    ]
    for kind, step, options in plan:
        if kind in fusions:
            step(model, **options)
    onnxscript_optimizer.optimize_ir(model)
    return model


def _onnxscript_fusions() -> tuple[Any, Any, Any, Any]:
    """Import what is needed of onnxscript's fuser.

    Its public function always fuses everything, and some fusions slow the CPU down: the single steps are private,
    so a release that moves them shall say so in words.

    Raises:
        BuildError: This release of onnxscript has them elsewhere.
    """
    try:
        from onnxscript.rewriter import ort_fusions, rewrite
        from onnxscript.rewriter.ort_fusions import _core as steps
        from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule
    except ImportError as error:
        raise BuildError(
            f"The fusions of onnxscript {onnxscript.__version__} are not where this package looks for them ({error}). "
            f"Install a release it knows: pip install 'onnxscript>=0.5.6,<0.8'"
        ) from error
    return ort_fusions, steps, rewrite, gemm_to_matmul_add_rule


def _fuse_transformers(src: Path, fusions: Collection[str], num_heads: int, hidden_size: int) -> ir.Model:
    """Run ONNX Runtime's own fuser, which knows TorchScript graphs of models with plain attention."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_attention = "attention" in fusions
    options.enable_bias_gelu = "bias_gelu" in fusions
    options.enable_embed_layer_norm = "embed_layer_norm" in fusions
    options.enable_gelu = "gelu" in fusions
    options.enable_layer_norm = "layer_norm" in fusions
    options.enable_rotary_embeddings = "rotary_embedding" in fusions
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = "skip_layer_norm" in fusions
    options.use_raw_attention_mask(True)  # the default keeps one length per row: wrong for left padding
    fused = optimize_model(
        str(src), "bert", num_heads=num_heads, hidden_size=hidden_size, opt_level=0, optimization_options=options
    )
    return ir.serde.deserialize_model(fused.model)


def _fused(model: ir.Model) -> dict[str, int]:
    counts = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return {kind: total for kind, ops in sorted(FUSED_OPS.items()) if (total := sum(counts[op] for op in ops))}


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.dtype), str(value.shape)) for value in values]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' logs below ERROR and their prints; the handler that ``logging.warning`` installs goes."""
    disabled, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(max(logging.WARNING, disabled))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
