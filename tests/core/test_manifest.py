import json

import pytest

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError, SchemaVersionError
from mlflow_tdeploy.core.manifest import SCHEMA_VERSION, Manifest, SourceRecord
from mlflow_tdeploy.core.records import to_json, to_plain
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import FileRecord, Variant, check_variant_id

MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    task="sentence-embedding",
    task_config={"pooling": "mean", "normalize": True},
    source=SourceRecord("sentence-transformers", "all-MiniLM-L6-v2", "0" * 40, "BertModel"),
    signature=Signature(
        (Dim("batch", 1, 8, 64), Dim("sequence", 1, 128, 512)),
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (TensorSpec("embedding", "float32", ("batch", 384)),),
    ),
    budget=Budget.of("worst_cosine >= 0.99"),
    reference="hf",
    assets=(FileRecord("assets/tokenizer.json", "a" * 64, 3),),
)


def _with(**changes):
    return json.dumps({**to_plain(MANIFEST), **changes})


def test_read_gives_the_manifest_back():
    assert Manifest.read(to_json(MANIFEST)) == MANIFEST
    assert Manifest.read(to_json(MANIFEST).encode()) == MANIFEST


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 10**30])
def test_read_names_the_upgrade_when_schema_is_newer(version):
    with pytest.raises(SchemaVersionError, match=rf"{version}.*reads up to 1.*pip install -U mlflow-tdeploy"):
        Manifest.read(_with(schema_version=version, task={"changed": "form"}))


@pytest.mark.parametrize("version", [None, "1", 1.5, True, [], 0, -1])
def test_read_says_damaged_when_schema_version_is_none_that_ever_was(version):
    with pytest.raises(ManifestError, match=r"manifest\.json.*schema_version"):
        Manifest.read(_with(schema_version=version))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "../hf"}, "Invalid variant id"),
        ({"assets": [{"path": "../x", "sha256": "a" * 64, "size": 1}]}, r"assets\[0\].*Unsafe path"),
        ({"assets": [{"path": "x", "sha256": "A" * 64, "size": 1}]}, r"not a sha256"),
        ({"assets": [{"path": "x", "sha256": "a" * 64, "size": -1}]}, r"negative size"),
        ({"budget": {"limits": [{"metric": "worst_cosine", "op": ">", "bound": 1}]}}, "op"),
        ({"signature": {"dims": [], "inputs": [], "outputs": []}}, "at least one input"),
    ],
)
def test_read_names_the_key_when_a_value_is_refused(changes, message):
    with pytest.raises(ManifestError, match=rf"(?s)manifest\.json\..*{message}|manifest\.json: {message}"):
        Manifest.read(_with(**changes))


@pytest.mark.parametrize("variant_id", ["", "A", "a" * 65, "../x", "a..b", "-a", "a/b", ".a", "a b", None, 3])
def test_check_variant_id_refuses_what_is_no_folder_name(variant_id):
    with pytest.raises(InvalidInputError, match="Invalid variant id"):
        check_variant_id(variant_id)


@pytest.mark.parametrize("variant_id", ["hf", "onnx-fp32", "trt-fp16-sm90", "a.b_c", "0", "a" * 64])
def test_check_variant_id_accepts_what_reads_well(variant_id):
    assert check_variant_id(variant_id) == variant_id


def test_variant_knows_its_size_and_whether_it_was_dropped():
    files = tuple(FileRecord(f"files/v/{index}", "a" * 64, 10) for index in range(3))
    base = {"id": "v", "format": "onnx", "precision": MANIFEST.budget, "device": "any", "entry": "files/v/0"}
    assert Variant(**base, files=files).size == 30
    assert not Variant(**base, files=files).dropped
    assert Variant(**base, files=()).dropped
