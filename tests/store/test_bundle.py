import dataclasses
import json
import os
import re

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import (
    IntegrityError,
    InvalidInputError,
    ManifestError,
    NotFoundError,
    SchemaVersionError,
)
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.store import hashing
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import HashCache
from mlflow_tdeploy.store.writer import append_evidence
from tests.bundles import WEIGHTS, accuracy, make_bundle

TWO = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS + 1}


@pytest.fixture
def root(tmp_path):
    return make_bundle(tmp_path / "model", TWO) / "tdeploy"


@pytest.fixture
def bundle(root):
    return Bundle.open(root)


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("folder", [".", ".."])
def test_open_takes_model_directory_and_tdeploy_folder(root, folder):
    bundle = Bundle.open(str(root / folder))
    assert bundle.root.resolve() == root
    assert bundle.manifest.task == "tensors"
    assert list(bundle.variants) == ["onnx-fp32", "ort-cpu-fp32"]


def test_open_says_what_is_expected_when_there_is_no_bundle(tmp_path):
    with pytest.raises(NotFoundError, match=r"holds none.*tdeploy/manifest.json"):
        Bundle.open(tmp_path)
    with pytest.raises(NotFoundError, match="does not exist"):
        Bundle.open(tmp_path / "nowhere")


def test_open_says_upgrade_when_manifest_is_of_a_newer_schema(root):
    _edit(root / "manifest.json", schema_version=2, something_new=[1])
    with pytest.raises(SchemaVersionError, match=r"schema version 2.*pip install -U mlflow-tdeploy"):
        Bundle.open(root)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", '{"schema_version": 1}', "[" * 100_000])
def test_open_names_the_manifest_when_it_is_damaged(root, text):
    (root / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Bundle.open(root)


def test_open_refuses_when_the_manifest_is_a_link_outside(root, tmp_path):
    os.rename(root / "manifest.json", tmp_path / "elsewhere.json")
    (root / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(IntegrityError, match="leads out"):
        Bundle.open(root)


def test_open_says_unreadable_when_the_manifest_is_a_folder(root):
    (root / "manifest.json").unlink()
    (root / "manifest.json").mkdir()
    with pytest.raises(IntegrityError, match=r"manifest\.json' cannot be read"):
        Bundle.open(root)


NEWER = {"schema_version": 2, "engine": {"sm": "90"}, "files": "of another form"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (NEWER, r"^written by a newer mlflow-tdeploy \(schema 2\)"),
        ({"warp": {"sm": "90"}}, r"^damaged: variants/ort-cpu-fp32\.json: unknown key 'warp'"),
        ({"schema_version": 0}, r"^damaged: variants/ort-cpu-fp32\.json: schema_version must be at least 1"),
        ({"device": ""}, "^damaged: .*'' is no name of a device"),
        ({"format": "../onnx"}, r"^damaged: .*'\.\./onnx' is no name of a format"),
        ({"files": [{"path": "../x", "sha256": "0" * 64, "size": 1}]}, "^damaged: .*Unsafe path"),
        ({"files": [{"path": "/etc/passwd", "sha256": "0" * 64, "size": 1}]}, "^damaged: .*Unsafe path"),
        ({"files": [{"path": "files/../../x", "sha256": "0" * 64, "size": 1}]}, "^damaged: .*Unsafe path"),
        ({"made_with": {"\ud800\n": 1}}, r"^damaged: .*\\ud800\\n"),
    ],
)
def test_variants_leaves_a_record_out_and_says_why_when_it_cannot_be_read(root, bundle, caplog, changes, why):
    _edit(root / "variants" / "ort-cpu-fp32.json", **changes)
    assert list(bundle.variants) == ["onnx-fp32"]
    assert list(bundle.unreadable) == ["ort-cpu-fp32"]
    assert re.search(why, bundle.unreadable["ort-cpu-fp32"])
    assert bundle.unreadable["ort-cpu-fp32"].isprintable()
    assert "variants/ort-cpu-fp32.json is left out" in caplog.text


def test_variants_leaves_a_record_out_when_its_bytes_are_damaged_or_a_link_outside(root, bundle, tmp_path):
    os.rename(root / "variants" / "ort-cpu-fp32.json", tmp_path / "outside.json")
    (root / "variants" / "ort-cpu-fp32.json").symlink_to(tmp_path / "outside.json")
    (root / "variants" / "torn.json").write_text('{"id": "to')
    (root / "variants" / "folder.json").mkdir()
    (root / "variants" / os.fsdecode(b"\xff.json")).write_text("{}")
    assert list(bundle.variants) == ["onnx-fp32"]
    assert "leads out of the bundle" in bundle.unreadable["ort-cpu-fp32"]
    assert "not valid JSON" in bundle.unreadable["torn"]
    assert "cannot be read" in bundle.unreadable["folder"]
    assert all(text.isprintable() for pair in bundle.unreadable.items() for text in pair)
    assert len(bundle.unreadable) == 4


def test_not_made_names_what_logging_could_not_make_until_somebody_adds_it(root, bundle):
    _edit(root / "manifest.json", skipped={"ort-cpu-fp32": "no fusion", "ort-cpu-int8": "no such operator"})
    bundle = Bundle.open(root)
    assert bundle.not_made == {"ort-cpu-int8": "no such operator"}
    assert bundle.absent == {"ort-cpu-int8": "could not be made: no such operator"}


def test_variants_leaves_a_record_out_when_the_id_is_not_the_file_name(root, bundle):
    os.rename(root / "variants" / "ort-cpu-fp32.json", root / "variants" / "ort-cpu-int8.json")
    assert list(bundle.variants) == ["onnx-fp32"]
    assert "is about the variant 'ort-cpu-fp32', its name says 'ort-cpu-int8'" in bundle.unreadable["ort-cpu-int8"]


def test_variants_reads_formats_and_devices_that_it_does_not_know(root, bundle):
    _edit(root / "variants" / "ort-cpu-fp32.json", format="openvino", device="npu")
    assert (bundle.variants["ort-cpu-fp32"].format, bundle.variants["ort-cpu-fp32"].device) == ("openvino", "npu")
    assert bundle.unreadable == {}


def test_variants_and_evidence_without_a_schema_version_are_of_the_first(root, bundle):
    for path in (*root.glob("variants/*.json"), *root.glob("evidence/*/*.json")):
        plain = json.loads(path.read_text())
        assert plain.pop("schema_version") == 1
        path.write_text(json.dumps(plain))
    assert bundle.variants["onnx-fp32"].schema_version == 1
    assert bundle.evidence("onnx-fp32")[0].schema_version == 1


def test_reload_reads_what_was_mended(root, bundle):
    path = root / "variants" / "ort-cpu-fp32.json"
    whole = path.read_bytes()
    path.write_text("{")
    assert set(bundle.unreadable) == {"ort-cpu-fp32"}
    path.write_bytes(whole)
    bundle.reload()
    assert bundle.unreadable == {}
    assert "ort-cpu-fp32" in bundle.variants


def test_variants_skips_unfinished_and_foreign_files(root, bundle):
    (root / "variants" / ".tdeploy-123").write_text("{")
    (root / "variants" / ".half.json").write_text("{")
    (root / "variants" / "notes.txt").write_text("hello")
    (root / "files" / "no-record").mkdir()
    assert list(bundle.variants) == ["onnx-fp32", "ort-cpu-fp32"]


def test_variants_is_empty_when_there_is_no_folder(root, bundle):
    os.rename(root / "variants", root / "gone")
    assert bundle.variants == {}


def test_variants_refuses_when_the_folder_is_a_link_outside(root, bundle, tmp_path):
    os.rename(root / "variants", tmp_path / "variants")
    (root / "variants").symlink_to(tmp_path / "variants")
    with pytest.raises(IntegrityError, match="leads out"):
        _ = bundle.variants


def test_evidence_is_in_order_of_time(root, bundle):
    names = [append_evidence(root, accuracy("onnx-fp32", created=str(n))) for n in range(5)]
    assert names == sorted(names)
    assert [e.created for e in bundle.evidence("onnx-fp32")][-5:] == list("01234")


def test_evidence_is_left_out_when_it_is_about_other_files(root, bundle):
    variant = bundle.variants["onnx-fp32"]
    own = dataclasses.replace(accuracy("onnx-fp32", created="2027"), files=variant.digest)
    append_evidence(root, own)
    append_evidence(root, dataclasses.replace(accuracy("onnx-fp32", passed=False, created="2028"), files="0" * 64))
    assert latest_accuracy(bundle.evidence("onnx-fp32")) == own


@pytest.mark.parametrize("passed", [True, False])
def test_evidence_of_a_variant_without_files_can_only_be_a_failure(tmp_path, passed):
    record = dataclasses.replace(accuracy("onnx-fp16", passed=passed), files="0" * 64)
    changes = {"onnx-fp16": {"files": ()}}
    made = make_bundle(
        tmp_path / "m", {"onnx-fp32": WEIGHTS, "onnx-fp16": WEIGHTS}, evidence={"onnx-fp16": [record]}, changes=changes
    )
    assert bool(Bundle.open(made).evidence("onnx-fp16")) is not passed


def test_evidence_is_empty_when_there_is_none(bundle):
    assert bundle.evidence("ort-cpu-int8") == ()


def test_evidence_refuses_when_the_id_is_a_path(bundle):
    with pytest.raises(InvalidInputError):
        bundle.evidence("../variants")


def test_evidence_is_left_out_when_it_is_about_another_variant(root, bundle, caplog):
    (path,) = (root / "evidence" / "onnx-fp32").iterdir()
    _edit(path, variant="ort-cpu-fp32")
    assert bundle.evidence("onnx-fp32") == ()
    assert len(bundle.evidence("ort-cpu-fp32")) == 1
    assert "is about the variant 'ort-cpu-fp32', its name says 'onnx-fp32'" in caplog.text


LATER = "20990101T000000000000Z-00000000.json"


@pytest.mark.parametrize(
    ("text", "doubt"),
    [
        ("{", "damaged"),  # cut off before it says what it is
        ('{"variant": "onnx-fp32", "kind": "latency", "me', None),
        ('{"kind": "energy", "schema_version": 2}', None),
        ('{"kind": "accuracy", "schema_version": 2}', r"written by a newer mlflow-tdeploy \(schema 2\)"),
        ('{"kind": "accuracy", "passed": "perhaps"}', "damaged"),
    ],
)
def test_doubt_names_the_file_when_the_newest_verdict_cannot_be_read(root, bundle, caplog, text, doubt):
    folder = root / "evidence" / "onnx-fp32"
    (folder / LATER).write_text(text)
    assert len(bundle.evidence("onnx-fp32")) == 1
    assert f"evidence/onnx-fp32/{LATER} is left out" in caplog.text
    if doubt is None:
        assert bundle.doubt("onnx-fp32") is None
    else:
        assert re.search(f"{LATER} is {doubt}", bundle.doubt("onnx-fp32"))
    assert bundle.doubt("ort-cpu-fp32") is None
    os.rename(folder / LATER, folder / "19990101T000000000000Z-00000000.json")  # superseded
    bundle.reload()
    assert bundle.doubt("onnx-fp32") is None


def test_evidence_of_a_kind_that_is_not_known_is_no_verdict(root, bundle):
    append_evidence(root, dataclasses.replace(accuracy("onnx-fp32", passed=False, created="2099"), kind="energy"))
    assert [item.kind for item in bundle.evidence("onnx-fp32")] == ["accuracy", "energy"]
    assert latest_accuracy(bundle.evidence("onnx-fp32")).passed
    assert bundle.doubt("onnx-fp32") is None


def test_reload_sees_what_was_added_since(root, bundle):
    assert len(bundle.evidence("onnx-fp32")) == 1
    append_evidence(root, accuracy("onnx-fp32"))
    assert len(bundle.evidence("onnx-fp32")) == 1
    bundle.reload()
    assert len(bundle.evidence("onnx-fp32")) == 2


def test_present_is_false_when_a_file_is_missing_or_truncated(root, bundle):
    variant, path = bundle.variants["onnx-fp32"], root / "files" / "onnx-fp32" / "model.onnx"
    assert bundle.present(variant)
    os.truncate(path, 5)
    assert not bundle.present(variant)
    path.unlink()
    assert not bundle.present(variant)


def test_present_is_false_when_files_were_dropped(tmp_path):
    root = make_bundle(tmp_path, changes={"onnx-fp32": {"files": ()}})
    bundle = Bundle.open(root)
    assert not bundle.present(bundle.variants["onnx-fp32"])
    bundle.verify(bundle.variants["onnx-fp32"])


def test_verify_passes_when_nothing_changed(bundle):
    for variant in bundle.variants.values():
        bundle.verify(variant)
    bundle.verify_assets()


def test_verify_names_the_file_when_a_byte_of_same_size_changed(root, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_YOUNG_NS", 0)
    cache = HashCache(tmp_path / "cache")
    bundle.verify(bundle.variants["onnx-fp32"], cache)
    path = root / "files" / "onnx-fp32" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"files/onnx-fp32/model\.onnx' was changed"):
        bundle.verify(bundle.variants["onnx-fp32"], cache)
    bundle.verify(bundle.variants["ort-cpu-fp32"], cache)


def test_verify_refuses_when_the_file_is_a_link_outside_with_the_same_content(root, bundle, tmp_path):
    path = root / "files" / "onnx-fp32" / "model.onnx"
    os.rename(path, tmp_path / "model.onnx")
    path.symlink_to(tmp_path / "model.onnx")
    with pytest.raises(IntegrityError, match="leads out"):
        bundle.verify(bundle.variants["onnx-fp32"])
    assert not bundle.present(bundle.variants["onnx-fp32"])


def test_verify_refuses_when_the_entry_is_not_a_recorded_file(root, bundle):
    (root / "files" / "onnx-fp32" / "evil.onnx").write_bytes(b"")
    _edit(root / "variants" / "onnx-fp32.json", entry="files/onnx-fp32/evil.onnx")
    with pytest.raises(IntegrityError, match="none of its recorded files"):
        bundle.verify(bundle.variants["onnx-fp32"])


def test_verify_refuses_when_a_file_was_planted_in_a_folder_that_is_opened(root, bundle):
    _edit(root / "variants" / "onnx-fp32.json", entry="files/onnx-fp32")
    bundle.verify(bundle.variants["onnx-fp32"])
    (root / "files" / "onnx-fp32" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin' lies in its folder and is not recorded"):
        bundle.verify(bundle.variants["onnx-fp32"])


def test_golden_returns_what_was_logged(bundle):
    (request,) = bundle.golden()
    np.testing.assert_array_equal(request.outputs["y"], request.feeds["x"] @ WEIGHTS)


def test_golden_is_empty_when_none_was_logged(root):
    _edit(root / "manifest.json", golden=[])
    assert Bundle.open(root).golden() == ()


@pytest.mark.parametrize("name", ["golden.json", "golden.npz"])
def test_golden_refuses_when_a_file_was_changed(root, bundle, name):
    path = root / "golden" / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=f"{name}' was changed"):
        bundle.golden()


def test_golden_says_what_is_expected_when_a_file_is_not_recorded(root):
    manifest = json.loads((root / "manifest.json").read_text())
    _edit(root / "manifest.json", golden=manifest["golden"][:1])
    with pytest.raises(ManifestError, match="golden requests are"):
        Bundle.open(root).golden()


def test_verify_refuses_weights_that_were_planted_beside_a_graph(root, bundle):
    """A graph may read them: it names files beside it, and nothing says that it has none."""
    variant = bundle.variants["onnx-fp32"]
    bundle.verify(variant)
    (root / variant.entry).with_name("other.bin").write_bytes(b"weights")
    with pytest.raises(IntegrityError, match=r"onnx-fp32/other\.bin' lies in its folder and is not recorded"):
        bundle.verify(variant)
