"""Configurations as they are written, for every form of a model; golden files beside this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import TritonBackend
from mlflow_tdeploy.triton.config import (
    Warmup,
    front_config,
    graph_config,
    messages,
    own_parameters,
    parse,
    to_text,
)
from mlflow_tdeploy.triton.options import TritonOptions
from tests.core.text_assets import LABELS, OUTPUTS, write_tokenizer

GOLDEN = Path(__file__).parent / "golden"
ORT, TRT = TritonBackend("onnxruntime", ".onnx"), TritonBackend("tensorrt", ".plan")
BATCH, SEQUENCE = Dim("batch", 1, 8, 64), Dim("sequence", 1, 128, 512)
IDS = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
TEXT = Signature((BATCH, SEQUENCE), IDS, (TensorSpec("sentence_embedding", "float32", ("batch", 384)),))
#: A number a row, other types, sizes that do not vary.
MIXED = Signature(
    (BATCH, Dim("time", 16, 16, 16)),
    (TensorSpec("x", "float32", ("batch", "time", 3)), TensorSpec("weight", "float16", ("batch",))),
    (TensorSpec("found", "bool", ("batch", "time")), TensorSpec("total", "float64", ("batch",))),
)
SINGLE = Signature(
    (),
    (TensorSpec("image", "uint8", (1, 224, 224, 3)), TensorSpec("scale", "float32", (1,))),
    (TensorSpec("boxes", "float32", (100, 4)),),
)


def variant(format_="onnx", device="any", entry="files/onnx-fp32/model.onnx", **more):
    return Variant("onnx-fp32", format_, Precision(), device, entry, (), **more)


def compare(name: str, config) -> None:
    """Hold a configuration against its golden file; TDEPLOY_WRITE_GOLDEN=1 writes it."""
    path = GOLDEN / f"{name}.pbtxt"
    if os.environ.get("TDEPLOY_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_text(config))
    assert to_text(config) == path.read_text()
    assert parse(path.read_text()) == config


CASES = {
    "text": (TEXT, variant("ort", "cpu", session={"disabled_optimizers": ["SkipLayerNormFusion"]}),
             ORT, {"instances": 2}, {"about": {"model_uri": "models:/m/7", "variant": "ort-cpu-fp32"}}),
    "half": (TEXT, variant(dtypes={"sentence_embedding": "float16"}), ORT, {}, {"gpu": True}),
    "mixed": (MIXED, variant(), ORT, {"max_batch_size": 16}, {}),
    "single": (SINGLE, variant(), ORT, {"graph_level": "extended"}, {}),
    "engine": (TEXT, variant("trt", "cuda", "files/trt-fp16-sm90/model.plan"), TRT,
               {"cuda_graphs": True, "gpus": "0,1", "profiles": [0, 1], "instances": 2, "preferred_batch_sizes": "8"},
               {"gpu": True}),
    "tuned": (TEXT, variant(), ORT, {
        "max_queue_delay_microseconds": "500", "max_queue_size": 128, "queue_timeout_microseconds": 100000,
        "queue_timeout_action": "delay", "priority_levels": 2, "default_priority_level": 1, "response_cache": "true",
        "intra_op_threads": 4, "inter_op_threads": 2, "parameters.enable_mem_arena": 0,
    }, {}),
    "warmup": (TEXT, variant(), ORT, {}, {"warmup": [Warmup("golden-0", 4, {"input_ids": ("int64", (5,), "0-ids")})]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_graph_config_is_what_it_was(name):
    signature, one, backend, options, more = CASES[name]
    compare(name, graph_config("m.v7", 7, signature, one, backend, TritonOptions.of(options), **more))


def classifier(folder):
    write_tokenizer(folder)
    signature = Signature(TEXT.dims, IDS, (OUTPUTS["text-classification"],))
    config = {"max_length": 8, "pad_id": 0, "labels": LABELS}
    return TASKS.get("text-classification")(config, signature, folder)


def test_front_config_is_what_it_was(tmp_path):
    compare("front", front_config("m", classifier(tmp_path), [7, 8], TritonOptions(front_instances=2), {"task": "x"}))
    compare("front_tensors", front_config("m", TASKS.get("tensors")({}, MIXED, tmp_path), [7], TritonOptions()))
    compare("front_single", front_config("m", TASKS.get("tensors")({}, SINGLE, tmp_path), [7], TritonOptions()))


@pytest.mark.parametrize(("largest", "said", "rows"), [(64, 0, 1024), (4096, 0, 4096), (4096, 8, 8)])
def test_the_stable_name_takes_as_many_rows_as_the_model(tmp_path, largest, said, rows):
    specs = (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch",)))
    task = TASKS.get("tensors")({}, Signature((Dim("batch", 1, 8, largest),), specs[:1], specs[1:]), tmp_path)
    assert front_config("m", task, [7], TritonOptions(front_batch_size=said)).max_batch_size == rows


def test_own_parameters_are_read_back(tmp_path):
    config = front_config("m", classifier(tmp_path), [7], TritonOptions(), {"task": "t", "history": "[6]"})
    assert own_parameters(parse(to_text(config))) == {"task": "t", "history": "[6]"}


@pytest.mark.parametrize(
    ("shapes", "least", "joined"),
    [
        ((("batch", 3), ("batch",)), 1, "batch"),
        ((("batch", 3), ("batch", "batch")), 1, None),  # similarities of all with all
        ((("batch", 3), (3,)), 1, None),
        ((("batch", 3), ()), 1, None),
        ((("batch", 3), ("rows", 3)), 1, None),
        ((("batch", 3), ("batch", "found")), 1, None),  # as many as are found in any row
        (((4, 3), (4,)), 1, None),
        ((("batch", 3), ("batch",)), 2, None),  # a request of one row may not come alone
    ],
)
def test_requests_are_joined_where_every_tensor_begins_with_one_dimension(shapes, least, joined):
    dims = (Dim("batch", least, 4, 8),)
    signature = Signature(dims, (TensorSpec("x", "float32", shapes[0]),), (TensorSpec("y", "float32", shapes[1]),))
    assert signature.batch_dim == joined


@pytest.mark.parametrize(
    ("signature", "options", "says"),
    [
        (
            SINGLE,
            {"max_batch_size": 4},
            "max_batch_size needs requests that can be joined: every tensor begins with one dimension",
        ),
        (TEXT, {"max_batch_size": 65}, "beyond the signature: batch 1..64"),
        (TEXT, {"max_batch_size": 8, "preferred_batch_sizes": [4, 16]}, "has 16, beyond the 8 rows"),
        (TEXT, {"cuda_graphs": True}, "for TensorRT engines"),
        (TEXT, {"profiles": [1]}, "for TensorRT engines"),
        (TEXT, {"gpus": [0]}, "gpus means nothing for a variant that runs on the CPU"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(signature, options, says):
    with pytest.raises(InvalidInputError, match=says):
        graph_config("m.v7", 7, signature, variant(), ORT, TritonOptions.of(options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"instance": 2}, r"Unknown Triton option 'instance'. Known: instances, .*parameters.NAME"),
        ({"instances": "two"}, "'instances' must be of type int"),
        ({"instances": -1}, "'instances' must be at least 0"),
        ({"front_batch_size": -1}, "must be at least 0"),
        ({"gpus": "0,x"}, "'gpus' must be of type int"),
        ({"preferred_batch_sizes": [0, 8]}, "must be at least 1"),
        ({"graph_level": "most"}, "one of all, basic, extended, disabled, got 'most'"),
        ({"queue_timeout_action": "drop"}, "one of reject, delay"),
        ({"priority_levels": 2}, "needs default_priority_level"),
        ({"priority_levels": 2, "default_priority_level": 3}, "from 1 to priority_levels"),
        ({"parameters": "a"}, "is a mapping"),
    ],
)
def test_options_that_are_wrong_are_refused(options, says):
    with pytest.raises(InvalidInputError, match=says):
        TritonOptions.of(options)


def test_a_front_of_bfloat16_is_refused_as_tritons_python_has_none(tmp_path):
    spec = TensorSpec("x", "bfloat16", ("batch", 3))
    task = TASKS.get("tensors")({}, Signature((BATCH,), (spec,), (TensorSpec("y", "float32", ("batch",)),)), tmp_path)
    with pytest.raises(InvalidInputError, match="'x' is bfloat16"):
        front_config("m", task, [7], TritonOptions())


def test_an_output_that_an_answer_would_hide_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    outputs = (OUTPUTS["text-classification"], TensorSpec("score", "float32", ("batch", 3)))
    config = {"max_length": 8, "pad_id": 0, "labels": LABELS}
    task = TASKS.get("text-classification")(config, Signature(TEXT.dims, IDS, outputs), tmp_path)
    with pytest.raises(InvalidInputError, match="'score' has the name of an answer"):
        front_config("m", task, [7], TritonOptions())


def test_text_that_is_no_configuration_is_refused():
    with pytest.raises(InvalidInputError, match="no configuration of Triton"):
        parse("name: [")
    assert messages().ModelConfig(name="m") == parse('name: "m"')


def test_a_number_without_an_axis_is_refused_where_requests_are_not_joined():
    """Triton's own words come when it is loaded: scalar tensors are not supported."""
    inputs = (SINGLE.inputs[0], TensorSpec("scale", "float32", ()))
    with pytest.raises(InvalidInputError, match="'scale' is a single number of a whole request"):
        graph_config("m.v7", 7, Signature(SINGLE.dims, inputs, SINGLE.outputs), variant(), ORT, TritonOptions())
