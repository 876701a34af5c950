from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.engine import EngineRecord, PlanHeader
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError
from mlflow_tdeploy.core.records import from_json, to_json

#: The first bytes of a plan that TensorRT-RTX 1.7.1.116 built.
RTX = bytes.fromhex("76747274000000000200000000000000 6ca6b90500000000 01070174 76747274")
#: A header in the layout of TensorRT 10.16.1.11; written by hand.
TRT = b"ftrt" + bytes.fromhex("f0000000 02000000 00000000 00100000 00000000") + bytes([10, 16, 1, 11])


def test_read_tells_library_and_version():
    assert PlanHeader.read(RTX) == PlanHeader("tensorrt_rtx", 0, "1.7.1.116")
    assert PlanHeader.read(TRT) == PlanHeader("tensorrt", 0xF0, "10.16.1.11")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "is no TensorRT engine"), (b"\x08\x08ONNX" * 9, "is no TensorRT engine"), (TRT[:20], "is cut off after 20")],
)
def test_read_says_what_is_wrong_with_what_is_no_plan(data, message):
    with pytest.raises(IntegrityError, match=f"^model.plan {message}"):
        PlanHeader.read(data, "model.plan")


@given(st.binary(max_size=64))
def test_read_gives_a_header_or_an_integrity_error(data):
    for start in (b"", b"ftrt", b"vtrt"):
        with contextlib.suppress(IntegrityError):
            assert PlanHeader.read(start + data).version.count(".") == 3


def test_record_survives_json():
    profile = {"input_ids": ((1, 1), (8, 128), (64, 512))}
    record = EngineRecord("tensorrt", "10.16.1.11", "linux-x86_64", "NVIDIA A10", "8.6", profiles=(profile, profile))
    assert from_json(EngineRecord, to_json(record), "x.json") == record


@pytest.mark.parametrize(
    "wrong", [{"module": "tensorrt_llm"}, {"version": "10.x"}, {"compute_capability": "sm_90"}, {"targets": ("",)}]
)
def test_record_refuses_what_nobody_writes(wrong):
    with pytest.raises(InvalidInputError):
        EngineRecord(**{"module": "tensorrt", "version": "10.16.1.11", **wrong})


def test_contradicts_says_how_a_plan_differs_from_its_record():
    record = EngineRecord("tensorrt", "10.16.1.11")
    assert record.contradicts(PlanHeader.read(TRT)) is None
    assert record.contradicts(PlanHeader.read(RTX)) == "it says tensorrt_rtx 1.7.1.116, its record tensorrt 10.16.1.11"
