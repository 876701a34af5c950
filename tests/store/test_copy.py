import dataclasses
import json
import shutil

import pytest

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.copy import copy_bundle
from tests.bundles import WEIGHTS, make_bundle


def test_copy_leaves_behind_what_cannot_be_read(tmp_path):
    root = make_bundle(tmp_path / "model", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}) / "tdeploy"
    record = root / "variants" / "ort-cpu-fp32.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "schema_version": 2}))
    verdict = root / "evidence" / "onnx-fp32" / "20990101T000000000000Z-0.json"
    verdict.write_text('{"kind": "accuracy", "schema_version": 2}')
    copy_bundle(Bundle.open(root), tmp_path / "copy")
    copied = Bundle.open(tmp_path / "copy")
    assert list(copied.variants) == ["onnx-fp32"]
    assert copied.unreadable == {}
    copied.verify(copied.variants["onnx-fp32"])
    assert not (copied.root / "files" / "ort-cpu-fp32").exists()
    assert copied.doubt("onnx-fp32")  # a copy is believed no more than the original


def test_what_was_written_is_hashed(tmp_path, monkeypatch):
    bundle = Bundle.open(make_bundle(tmp_path / "made"))
    real = shutil.copyfile

    def damage(source, target):
        real(source, target)
        if target.name == "model.onnx":
            target.write_bytes(target.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(shutil, "copyfile", damage)
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        copy_bundle(bundle, tmp_path / "copy")


def test_what_a_variant_shares_is_copied_with_it(tmp_path):
    """Also where the record of the variant that it shares with cannot be read."""
    root = make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "onnx-other": WEIGHTS})
    bundle = Bundle.open(root)
    engine = dataclasses.replace(bundle.variants["onnx-fp32"], shared=bundle.variants["onnx-other"].files)
    record = root / "tdeploy/variants"
    (record / "onnx-fp32.json").write_text(to_json(engine))
    (record / "onnx-other.json").write_text(
        json.dumps({**json.loads((record / "onnx-other.json").read_text()), "schema_version": 99, "new": 1})
    )
    copy_bundle(Bundle.open(root), tmp_path / "copy")
    copied = Bundle.open(tmp_path / "copy")
    copied.verify(copied.variants["onnx-fp32"])
    assert engine.digest != bundle.variants["onnx-fp32"].digest  # evidence belongs to all that it needs
