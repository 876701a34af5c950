import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlflow_tdeploy.core import golden
from mlflow_tdeploy.core.errors import ManifestError
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.tensors import DTYPES, numpy_dtype

arrays = hnp.arrays(
    st.sampled_from(["bool", "int8", "int64", "uint16", "float16", "float32", "float64", "<U5"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
names = st.text(st.sampled_from("ab/|.:_ "), min_size=1, max_size=6)
feeds = st.dictionaries(names, arrays, max_size=4)


@settings(deadline=None, max_examples=60)
@given(feeds, feeds)
def test_load_gives_arrays_back_whatever_their_names(inputs, outputs):
    request = GoldenRequest(inputs, inputs, outputs, [{"label": "a", "score": 0.5}])
    (loaded,) = golden.load(*golden.dump((request,)))
    assert loaded.answer == request.answer
    for expected, got in ((inputs, loaded.inputs), (inputs, loaded.feeds), (outputs, loaded.outputs)):
        assert list(got) == list(expected)
        for name in expected:
            assert got[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_keeps_every_dtype_a_tensor_may_have(dtype):
    array = np.arange(4).astype(numpy_dtype(dtype))
    (loaded,) = golden.load(*golden.dump((GoldenRequest("text", {"x": array}, {}, None),)))
    assert loaded.feeds["x"].dtype == numpy_dtype(dtype)
    assert loaded.feeds["x"].tobytes() == array.tobytes()


def test_load_keeps_arrays_apart_when_nested_names_look_alike():
    inputs = {"a": {"b": np.zeros(1)}, "a.b": np.ones(1)}
    (loaded,) = golden.load(*golden.dump((GoldenRequest(inputs, {}, {}, None),)))
    assert loaded.inputs["a"]["b"] == [0]
    assert loaded.inputs["a.b"] == [1]


def test_dump_stores_texts_as_text_when_they_come_as_an_object_array():
    request = GoldenRequest(np.array(["ä", "b"], dtype=object), {}, {}, np.float32(1.5))
    text, npz = golden.dump((request,))
    (loaded,) = golden.load(text, npz)
    assert loaded.inputs == ["ä", "b"]
    assert loaded.answer == 1.5


def test_load_refuses_when_an_array_is_pickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    text, _ = golden.dump((GoldenRequest("text", {"x": np.zeros(1)}, {}, None),))
    np.savez(tmp_path / "evil.npz", a0=np.array([Evil()], dtype=object))
    with pytest.raises(ManifestError, match="damaged"):
        golden.load(text, (tmp_path / "evil.npz").read_bytes())
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"requests": [1]}', '{"requests": [{"inputs": 1}]}', "[" * 10**6])
def test_load_says_damaged_when_text_is_damaged(text):
    _, npz = golden.dump((GoldenRequest("text", {"x": np.zeros(1)}, {}, None),))
    with pytest.raises(ManifestError, match=r"damaged.*Log the model again"):
        golden.load(text, npz)


@pytest.mark.parametrize("npz", [b"", b"PK", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_load_says_damaged_when_arrays_are_damaged(npz):
    text, _ = golden.dump((GoldenRequest("text", {"x": np.zeros(1)}, {}, None),))
    with pytest.raises(ManifestError, match="damaged"):
        golden.load(text, npz)


def test_load_raises_only_our_error_when_any_byte_of_the_arrays_is_changed():
    text, npz = golden.dump((GoldenRequest("text", {"x": np.arange(8.0)}, {}, None),))
    damaged = 0
    for offset in range(len(npz)):
        try:
            golden.load(text, npz[:offset] + bytes([npz[offset] ^ 0xFF]) + npz[offset + 1 :])
        except ManifestError:
            damaged += 1
    assert damaged > len(npz) / 2


def test_dump_is_readable_json():
    text, _ = golden.dump((GoldenRequest(["grün"], {"x": np.zeros(1)}, {}, [0.5]),))
    assert "grün" in text
    assert json.loads(text)["requests"][0]["answer"] == [0.5]
