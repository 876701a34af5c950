"""Hand-made bundles of the text tasks: a real tokenizer and a graph that looks words up and averages them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.core.manifest import SCHEMA_VERSION, Manifest, SourceRecord
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.store.writer import BundleDraft
from tests.bundles import accuracy
from tests.core.text_assets import LABELS, OUTPUTS, WIDTH, WORDS, write_tokenizer

TABLE = np.random.default_rng(0).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
HEAD = np.random.default_rng(1).standard_normal((WIDTH, 3)).astype(np.float32)


def embed(text: str, table: np.ndarray = TABLE) -> np.ndarray:
    """Return the sentence embedding that the graph must give."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    return table[ids].mean(axis=0)


def make_text_bundle(
    root: Path,
    task: str = "sentence-embedding",
    *,
    failed: tuple[str, ...] = (),
    batch: tuple[int, int, int] = (1, 2, 4),
    times: float = 1.0,
) -> Path:
    """Write a model directory with the variants onnx-fp32 (the reference) and ort-cpu-int8.

    The second one's answers are a little different, so that a test can tell which one served. Variants in ``failed``
    are recorded as over budget. ``batch`` is the range of that dimension. Vectors are ``times`` those of the words.
    """
    draft = BundleDraft(root / "tdeploy")
    write_tokenizer(draft.root / "assets")
    signature = Signature(
        dims=(Dim("batch", *batch), Dim("sequence", 1, 4, 8)),
        inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")),
        outputs=(OUTPUTS[task],),
    )
    own = {
        "text-classification": {"labels": LABELS},
        "token-classification": {"labels": LABELS},
        "fill-mask": {"mask_id": 1},
        "zero-shot-classification": {"candidate_labels": ["good", "bad film"], "hypothesis_template": "a {}"},
    }.get(task, {})
    config = {"max_length": 8, "pad_id": 0, **own}
    draft.write_manifest(
        Manifest(
            schema_version=SCHEMA_VERSION,
            task=task,
            task_config=config,
            source=SourceRecord("onnx", "words"),
            signature=signature,
            budget=TASKS.get(task).default_budget,
            reference="onnx-fp32",
            assets=draft.add_tree("assets"),
        )
    )
    for variant_id, scale in {"onnx-fp32": 1.0, "ort-cpu-int8": 1.0001}.items():
        graph(draft.root / "files" / variant_id / "model.onnx", task, scale * times)
        name = variant_id.rsplit("-", 1)[-1]
        draft.write_evidence(accuracy(variant_id, passed=variant_id not in failed))
        draft.write_variant(
            Variant(
                id=variant_id,
                format="ort" if variant_id.startswith("ort") else "onnx",
                precision=Precision(name, name),
                device="cpu" if variant_id.startswith("ort") else "any",
                entry=f"files/{variant_id}/model.onnx",
                files=draft.add_tree(f"files/{variant_id}"),
            )
        )
    return root


def graph(path: Path, task: str, scale: float = 1.0) -> None:
    """Write the graph of a task; its answers are ``scale`` times the word vectors'."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    if task not in ("feature-extraction", "token-classification", "fill-mask"):
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["last_hidden_state", "mask3"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "middle"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
            helper.make_node("Div", ["sum", "count"], ["sentence_embedding"]),
        ]
    if task in ("text-classification", "zero-shot-classification"):
        nodes.append(helper.make_node("MatMul", ["sentence_embedding", "head"], ["logits"]))
    if task in ("token-classification", "fill-mask"):
        head = "head" if task == "token-classification" else "words"
        nodes.append(helper.make_node("MatMul", ["last_hidden_state", head], ["logits"]))
    constants = {
        "table": TABLE * np.float32(scale),
        "head": HEAD,
        "words": TABLE.T.copy(),
        "last": np.array([2]),
        "middle": np.array([1]),
    }
    used = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        "words",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info(OUTPUTS[task].name, TensorProto.FLOAT, list(OUTPUTS[task].shape))],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
