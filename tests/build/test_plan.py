from __future__ import annotations

import pytest

from mlflow_tdeploy.build.plan import plan_variants
from mlflow_tdeploy.core.errors import InvalidInputError

ALL = {"onnx-fp32", "onnx-fp16", "ort-cpu-fp32", "ort-cpu-int8"}


def _order(plan):
    return [recipe.id for recipe in plan.order]


def test_plan_variants_makes_every_default_variant_parents_first_when_nothing_is_asked():
    plan = plan_variants(None, given=(), exportable=True)
    assert set(_order(plan)) == plan.keep == ALL
    for recipe in plan.order:
        assert recipe.parent is None or _order(plan).index(recipe.parent) < _order(plan).index(recipe.id)


def test_plan_variants_makes_what_is_for_a_gpu_where_there_is_one():
    assert plan_variants(None, given=(), exportable=True, gpu=True).keep == {*ALL, "ort-cuda-fp16"}


def test_plan_variants_makes_but_does_not_keep_the_steps_on_the_way():
    plan = plan_variants(["int8"], given=(), exportable=True)
    assert _order(plan) == ["onnx-fp32", "ort-cpu-int8"]
    assert plan.keep == {"ort-cpu-int8"}


def test_plan_variants_keeps_what_is_required_beside_what_is_asked():
    assert plan_variants(["int8"], given=(), exportable=True, required=["onnx-fp32"]).keep == {
        "onnx-fp32",
        "ort-cpu-int8",
    }


@pytest.mark.parametrize(("name", "kept"), [("fp32", {"onnx-fp32", "ort-cpu-fp32"}), ("onnx-fp16", {"onnx-fp16"})])
def test_plan_variants_reads_aliases_and_ids(name, kept):
    assert plan_variants([name], given=(), exportable=True).keep == kept


def test_plan_variants_adds_nothing_when_hf_is_asked():
    assert plan_variants(["hf"], given=(), exportable=True).order == ()


def test_plan_variants_starts_from_given_graphs_when_there_are_some():
    plan = plan_variants(["int8"], given=["onnx-fp32", "mine"], exportable=False)
    assert _order(plan) == ["ort-cpu-int8"]
    assert plan.keep == {"onnx-fp32", "mine", "ort-cpu-int8"}


def test_plan_variants_names_what_exists_when_a_name_is_unknown():
    with pytest.raises(InvalidInputError, match=r"'int3'.*fp16.*ort-cpu-int8"):
        plan_variants(["int3"], given=(), exportable=True)


def test_plan_variants_says_what_is_missing_when_a_variant_cannot_be_made():
    with pytest.raises(InvalidInputError, match="needs the portable graph"):
        plan_variants(["int8"], given=["onnx-fp16"], exportable=False)


def test_plan_variants_refuses_a_plain_string():
    with pytest.raises(InvalidInputError, match="is a list"):
        plan_variants("fp32", given=(), exportable=True)


def test_of_a_precision_the_faster_form_of_another_may_fail():
    assert plan_variants(["fp32"], given=(), exportable=True).explicit == {"onnx-fp32"}
    assert plan_variants(["ort-cpu-fp32"], given=(), exportable=True).explicit == {"ort-cpu-fp32"}
    assert plan_variants(["int8"], given=(), exportable=True).explicit == {"ort-cpu-int8"}
    assert plan_variants(None, given=(), exportable=True).explicit == frozenset()


def test_auto_is_what_is_looked_for_on_this_kind_of_host_and_no_failure_of_it_is_an_error():
    cpu = plan_variants(["auto"], given=(), exportable=True)
    assert {one.id for one in cpu.order} == {"onnx-fp32", "ort-cpu-fp32", "ort-cpu-int8-mixed", "onnx-int8"}
    assert cpu.keep == {"ort-cpu-fp32", "ort-cpu-int8-mixed", "onnx-int8"}
    assert cpu.explicit == frozenset()
    gpu = plan_variants(["auto"], given=(), exportable=True, gpu=True)
    assert gpu.keep == {"ort-cpu-fp32", "ort-cpu-int8-mixed", "onnx-int8", "ort-cuda-fp16"}
