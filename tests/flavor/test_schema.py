from __future__ import annotations

import numpy as np
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm
from mlflow_tdeploy.core.tensors import Dim, Signature
from mlflow_tdeploy.core.tensors import TensorSpec as OurSpec
from mlflow_tdeploy.flavor.schema import merge_signature, mlflow_signature
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ASSETS
from tests.flavor.text_bundles import make_text_bundle


@pytest.fixture
def task(tmp_path):
    """Return a function that gives a text task of a name."""

    def make(name):
        bundle = Bundle.open(make_text_bundle(tmp_path / name, name))
        return TASKS.get(name)(bundle.manifest.task_config, bundle.manifest.signature, bundle.root / ASSETS)

    return make


@pytest.fixture
def tensors(tmp_path):
    """A task with a ranged, a fixed and a data-dependent dimension."""
    signature = Signature(
        dims=(Dim("batch", 1, 2, 8), Dim("time", 16, 16, 16)),
        inputs=(OurSpec("x", "float16", ("batch", "time", 3)), OurSpec("mask", "bool", ("batch", "time"))),
        outputs=(OurSpec("y", "int64", ("batch", "found")),),
    )
    return TASKS.get("tensors")({}, signature, tmp_path)


def test_mlflow_signature_leaves_inputs_to_the_task_when_it_is_about_texts(task):
    signature = mlflow_signature(task("sentence-embedding"))
    assert signature.inputs is None
    assert signature.outputs == Schema([TensorSpec(np.dtype("float32"), (-1, 4))])
    assert [spec.name for spec in signature.params.params] == [
        "prompt_name",
        "prompt",
        "errors",
        "variant",
        "runtime",
        "strict",
    ]


def test_mlflow_signature_names_label_and_score_when_the_task_classifies(task):
    signature = mlflow_signature(task("text-classification"))
    assert signature.outputs.input_names() == ["label", "score"]
    assert {spec.name: spec.default for spec in signature.params.params} == {
        "top_k": 1,
        "function_to_apply": "",
        "errors": "raise",
        "variant": "",
        "runtime": "",
        "strict": False,
    }


@pytest.mark.parametrize(
    ("name", "columns", "fits"),
    [
        ("text-classification", {"text": "string", "text_pair": "string"}, True),
        ("text-classification", {"any": "string"}, True),
        ("text-classification", {"text_pair": "string", "other": "string"}, False),
        ("text-classification", {"text": "string", "text_pair": "long"}, False),
        ("question-answering", {"question": "string", "context": "string"}, True),
        ("question-answering", {"question": "string"}, False),
        ("text-ranking", {"query": "string", "documents": Array("string")}, True),
        ("text-ranking", {"query": "string", "documents": "string"}, False),
    ],
)
def test_merge_signature_takes_the_columns_of_the_task(name, columns, fits):
    made = _Bare(TASKS.get(name))
    given = ModelSignature(inputs=Schema([ColSpec(kind, name) for name, kind in columns.items()]))
    if not fits:
        with pytest.raises(InvalidInputError, match=f"does not fit task '{name}'"):
            merge_signature(made, given)
        return
    assert merge_signature(made, given).inputs == given.inputs


class _Bare:
    """A task with nothing but what a signature is made of."""

    def __init__(self, task):
        self.name, self.columns, self.input_kind, self.params = task.name, task.columns, "text", task.params
        self.answer_form = lambda: AnswerForm("nested")


def test_mlflow_signature_survives_the_mlmodel_file_for_every_task(task, tensors):
    for made in (*map(task, ("sentence-embedding", "text-classification", "feature-extraction")), tensors):
        signature = mlflow_signature(made)
        assert ModelSignature.from_dict(signature.to_dict()) == signature


def test_mlflow_signature_has_minus_one_where_a_dimension_has_a_range(tensors):
    signature = mlflow_signature(tensors)
    assert [spec.shape for spec in signature.inputs.inputs] == [(-1, 16, 3), (-1, 16)]
    assert [spec.type for spec in signature.inputs.inputs] == [np.dtype("float16"), np.dtype("bool")]
    assert signature.outputs.inputs[0].shape == (-1, -1)


def test_merge_signature_keeps_the_users_and_adds_the_parameters(task):
    given = ModelSignature(inputs=Schema([ColSpec("string", "review")]))
    merged = merge_signature(task("text-classification"), given)
    assert merged.inputs == given.inputs
    assert merged.outputs.input_names() == ["label", "score"]
    assert {spec.name for spec in merged.params.params} >= {"top_k", "variant"}


@pytest.mark.parametrize(
    "inputs",
    [
        Schema([ColSpec("long")]),
        Schema([ColSpec("string", "a"), ColSpec("string", "b")]),
        Schema([TensorSpec(np.dtype("int64"), (-1, -1))]),
    ],
    ids=["numbers", "two columns", "a tensor"],
)
def test_merge_signature_refuses_what_is_not_one_column_of_texts(task, inputs):
    with pytest.raises(InvalidInputError, match="one column of strings"):
        merge_signature(task("sentence-embedding"), ModelSignature(inputs=inputs))


def test_merge_signature_refuses_a_parameter_that_the_task_does_not_take(task):
    params = ParamSchema([ParamSpec("temperature", "double", 1.0)])
    with pytest.raises(InvalidInputError, match="'temperature'.*Known: prompt_name, prompt, errors, variant, runtime"):
        merge_signature(task("sentence-embedding"), ModelSignature(inputs=Schema([ColSpec("string")]), params=params))


def tensor_schema(**changes):
    specs = {"x": (np.dtype("float16"), (-1, 16, 3)), "mask": (np.dtype("bool"), (-1, 16)), **changes}
    return ModelSignature(inputs=Schema([TensorSpec(kind, shape, name) for name, (kind, shape) in specs.items()]))


def test_merge_signature_takes_tensors_that_fit(tensors):
    given = tensor_schema(x=(np.dtype("float16"), (4, 16, 3)))
    assert merge_signature(tensors, given).inputs == given.inputs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tensor_schema(x=(np.dtype("float32"), (-1, 16, 3))), "input 'x'.*float16.*float32"),
        (tensor_schema(mask=(np.dtype("bool"), (-1, 17))), "input 'mask'"),
        (tensor_schema(more=(np.dtype("bool"), (-1,))), "'more'"),
        (ModelSignature(inputs=Schema([ColSpec("string")])), "takes tensors"),
    ],
)
def test_merge_signature_refuses_tensors_that_do_not_fit(tensors, given, message):
    with pytest.raises(InvalidInputError, match=message):
        merge_signature(tensors, given)
