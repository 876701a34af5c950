"""Whatever is in the records' files, only our own errors come out."""

import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_tdeploy.core import golden
from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.core.evidence import DataRecord, Evidence
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.records import from_json, to_json, to_plain
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import make_bundle

HOST = Fingerprint("linux-x86_64", "cpu", ("avx2",), 2, 1, Gpu("H200", "9.0", 1, "13.0"), {"onnxruntime": "1.31"})
EVIDENCE = Evidence("v", "latency", {"p50_ms": 1.5}, DataRecord("d", "0" * 64, 3), HOST, None, ("a",), ("b",), {"t": 1})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**19), 1e308]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../x", "/x", "\ud800", "\x00", "onnx-fp32", "int64", "batch", "a" * 5000, ">="]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    bundle = Bundle.open(make_bundle(tmp_path_factory.mktemp("fuzz") / "model"))
    (variant,) = bundle.variants.values()
    host = to_plain(HOST)
    full = {**to_plain(variant), "built_for": host, "parent": "hf", "requires": {"a": "1"}, "session": {"x": [1]}}
    return {
        Manifest: to_plain(bundle.manifest),
        Variant: full,
        Evidence: to_plain(EVIDENCE),
    }


def _paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*prefix, key))


@st.composite
def mutations(draw, plain):
    plain = copy.deepcopy(plain)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_paths(plain))))
        if not path:
            continue
        holder = plain
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "delete":
            del holder[path[-1]]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(values)
        else:
            holder[path[-1]] = draw(values)
    return plain


def _read(cls, text):
    try:
        record = Manifest.read(text) if cls is Manifest else from_json(cls, text, "x.json")
    except TDeployError:
        return None
    assert isinstance(record, cls)
    return record


CLASSES = pytest.mark.parametrize("cls", [Manifest, Variant, Evidence])
FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@CLASSES
def test_readers_accept_the_unchanged_record(records, cls):
    record = _read(cls, json.dumps(records[cls]))
    assert record is not None
    assert _read(cls, to_json(record)) == record


@CLASSES
@settings(FIXTURES, max_examples=100)
@given(value=values)
def test_readers_raise_only_our_errors_when_json_is_random(cls, value):
    _read(cls, json.dumps(value))


@CLASSES
@settings(FIXTURES, max_examples=200)
@given(data=st.data())
def test_readers_raise_only_our_errors_when_a_record_is_mutated(records, cls, data):
    _read(cls, json.dumps(data.draw(mutations(records[cls]))))


@CLASSES
@settings(FIXTURES, max_examples=100)
@given(data=st.data())
def test_readers_raise_only_our_errors_when_bytes_are_damaged(records, cls, data):
    content = bytearray(json.dumps(records[cls]).encode())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
    _read(cls, bytes(content))


@CLASSES
@pytest.mark.parametrize("depth", [300, 900, 980, 1500, 100_000])
@pytest.mark.parametrize("key", ["task_config", "session", "settings", "signature", "files", "metrics"])
def test_readers_raise_only_our_errors_when_json_is_deep(records, cls, depth, key):
    if key in records[cls]:
        text = json.dumps({**records[cls], key: "DEEP"})
        _read(cls, text.replace('"DEEP"', '{"a":' * depth + "1" + "}" * depth))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("fuzz") / "model")


@settings(FIXTURES, max_examples=60)
@given(data=st.data())
def test_bundle_raises_only_our_errors_when_its_variant_is_mutated(model, records, data):
    plain = data.draw(mutations({**records[Variant], "id": "onnx-fp32"}))
    (model / "tdeploy" / "variants" / "onnx-fp32.json").write_text(json.dumps(plain))
    _use_everything(model)


@settings(FIXTURES, max_examples=60)
@given(data=st.data())
def test_bundle_raises_only_our_errors_when_evidence_is_mutated(model, records, data):
    plain = data.draw(mutations({**records[Evidence], "variant": "onnx-fp32", "kind": "accuracy", "passed": True}))
    (path, *_) = sorted((model / "tdeploy" / "evidence" / "onnx-fp32").iterdir())
    path.write_text(json.dumps(plain))
    _use_everything(model)


def _use_everything(model):
    """Reading and choosing raise nothing at all, whatever is in one record; only the check of files may refuse."""
    bundle = Bundle.open(model)
    assert {*bundle.variants, *bundle.unreadable} == {"onnx-fp32"}
    assert all(text.isprintable() for pair in bundle.unreadable.items() for text in pair)
    decision = decide_bundle(bundle, HOST)
    assert {candidate.variant for candidate in decision.candidates} == {"onnx-fp32"}
    decision.explain()
    for variant in bundle.variants.values():
        bundle.present(variant)
        with contextlib.suppress(TDeployError):
            bundle.verify(variant)


@settings(FIXTURES, max_examples=150)
@given(data=st.data())
def test_golden_load_raises_only_our_errors_when_bytes_are_damaged(model, data):
    contents = {
        name: bytearray((model / "tdeploy" / "golden" / name).read_bytes()) for name in ("golden.json", "golden.npz")
    }
    for content in contents.values():
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=20))
    with contextlib.suppress(TDeployError):
        golden.load(*map(bytes, contents.values()))
