"""The small files of a bundle in one."""

from __future__ import annotations

import zipfile

import pytest

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ADDED, PACK
from mlflow_tdeploy.store.pack import _digest, _held, unpack, write_pack
from mlflow_tdeploy.store.writer import append_evidence, append_variant
from tests.bundles import WEIGHTS, accuracy, make_bundle
from tests.store.staging import stage


@pytest.fixture
def root(tmp_path):
    return make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}) / "tdeploy"


def test_what_is_unpacked_is_the_bundle_without_the_files_of_its_variants(root, tmp_path):
    (root / ".tdeploy-half").write_text("of a writer that is at it")
    write_pack(root)
    found = unpack(root / PACK, tmp_path / "to" / "tdeploy")
    packed, whole = Bundle.open(tmp_path / "to"), Bundle.open(root)
    assert packed.manifest == whole.manifest
    assert packed.variants == whole.variants
    assert packed.evidence("ort-cpu-fp32") == whole.evidence("ort-cpu-fp32")
    assert found == {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {
        PACK, ".tdeploy-half", *(one.path for variant in whole.variants.values() for one in variant.files)
    }  # fmt: skip
    assert not packed.present(packed.variants["onnx-fp32"])


def test_the_same_bundle_is_the_same_pack(root):
    write_pack(root)
    first = (root / PACK).read_bytes()
    (root / PACK).unlink()
    write_pack(root)
    assert (root / PACK).read_bytes() == first


@pytest.mark.parametrize("damage", ["cut", "byte", "other", "empty"])
def test_a_damaged_pack_is_refused(root, tmp_path, damage):
    write_pack(root)
    content = (root / PACK).read_bytes()
    middle = len(content) // 3
    changed = {
        "cut": content[:middle],
        "byte": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
        "other": b"no archive",
        "empty": b"",
    }
    (root / PACK).write_bytes(changed[damage])
    with pytest.raises(IntegrityError, match="records.zip"):
        unpack(root / PACK, tmp_path / "to")


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "files/onnx-fp32/model.onnx", ".tdeploy-x", "variants/.tdeploy-x", "a\\..\\b"]
)
def test_a_pack_writes_nothing_that_does_not_belong_into_it(root, tmp_path, name):
    write_pack(root)
    with zipfile.ZipFile(root / PACK, "a") as archive:
        archive.writestr(name, "x")
        archive.comment = _digest({one: archive.read(one) for one in archive.namelist()})
    with pytest.raises((IntegrityError, InvalidInputError), match="does not belong|path"):
        unpack(root / PACK, tmp_path / "a" / "to")
    assert not list(tmp_path.rglob("outside"))
    assert not (tmp_path / "a").exists()


def test_a_pack_with_any_byte_changed_is_whole_or_refused(root):
    write_pack(root)
    content = (root / PACK).read_bytes()
    whole, refused = _held(content), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x15
        try:
            assert _held(bytes(changed)) == whole, place
        except IntegrityError:
            refused += 1
    assert refused > len(content) // 2


def test_hidden_files_of_a_model_are_packed_too(root, tmp_path):
    (root / "assets").mkdir(exist_ok=True)
    (root / "assets" / ".gitattributes").write_text("x")
    write_pack(root)
    assert "assets/.gitattributes" in unpack(root / PACK, tmp_path / "to")


def test_who_adds_to_a_bundle_leaves_a_sign(root, tmp_path):
    write_pack(root)
    assert not (root / ADDED).exists()
    append_evidence(root, accuracy("ort-cpu-fp32"))
    assert (root / ADDED).is_file()
    (root / ADDED).unlink()
    variant = stage(tmp_path / "new", "onnx-fp16")
    append_variant(root, variant, tmp_path / "new", [accuracy("onnx-fp16")])
    assert (root / ADDED).is_file()
