from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, NotFoundError
from mlflow_tdeploy.source.resolve import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_resolve_lists_the_tasks_when_the_task_is_unknown(minilm_path):
    with pytest.raises(InvalidInputError, match="'translation'.*feature-extraction, fill-mask, .*tensors, "):
        resolve(minilm_path, task="translation")


def test_resolve_says_what_it_accepts_when_the_model_is_something_else():
    with pytest.raises(InvalidInputError, match="Cannot log a dict_keys.*SentenceTransformer.*ModelProto"):
        resolve({}.keys())


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7], COMMIT.upper()])
def test_resolve_refuses_remote_code_when_no_full_commit_pins_it(revision):
    with pytest.raises(InvalidInputError, match="full commit"):
        resolve("owner/model", revision=revision, trust_remote_code=True)


def test_resolve_fails_clearly_when_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="'owner/no-such-model' is no local folder.*pass the folder"):
        resolve("owner/no-such-model")


@pytest.mark.parametrize("model", ["../elsewhere", "a/b/c", "owner/--x", Path("nothing"), "graph.onnx"])
def test_resolve_asks_no_hub_when_the_location_can_only_be_a_path(model, monkeypatch):
    monkeypatch.setattr("mlflow_tdeploy.source.resolve.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError):
        resolve(model)


def _cached_repository(cache: Path, files: Path) -> None:
    """Lay out what huggingface_hub leaves on a host that downloaded a commit."""
    snapshot = cache / "models--owner--model" / "snapshots" / COMMIT
    shutil.copytree(files, snapshot)
    refs = cache / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)


def test_resolve_records_the_commit_when_a_pinned_hub_id_is_in_the_cache(tiny_bert, tmp_path, monkeypatch):
    _cached_repository(tmp_path, tiny_bert)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve("owner/model", revision=COMMIT)
    assert (source.record.name, source.record.revision) == ("owner/model", COMMIT)
    assert source.record.architecture == "BertForSequenceClassification"
    assert source.task == "text-classification"


def test_resolve_refuses_code_of_another_repository_when_remote_code_is_trusted(tiny_bert, tmp_path, monkeypatch):
    _cached_repository(tmp_path, tiny_bert)
    path = tmp_path / "models--owner--model" / "snapshots" / COMMIT / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoModel": "other/code--modeling.Model"}}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidInputError, match="other/code"):
        resolve("owner/model", revision=COMMIT, trust_remote_code=True)


def test_resolve_refuses_pickles_when_a_folder_has_nothing_else(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InvalidInputError, match=r"only pytorch_model\.bin.*use_safetensors=False.*save_pretrained"):
        resolve(tmp_path / "old")


def test_resolve_refuses_an_adapter_when_it_has_no_model(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="merge_and_unload"):
        resolve(tmp_path / "lora")


def test_resolve_runs_no_code_when_a_folder_brings_its_own(tiny_bert, tmp_path):
    folder = tmp_path / "custom"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InvalidInputError, match="trust_remote_code|custom code"):
        resolve(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.bin"])
def test_resolve_refuses_a_file_when_it_is_no_graph(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="no ONNX graph"):
        resolve(tmp_path / name)


def test_resolve_says_what_is_missing_when_a_folder_is_no_model(tmp_path):
    (tmp_path / "graph.onnx").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match=r"neither config\.json.*'graph\.onnx'"):
        resolve(tmp_path)


def test_resolve_refuses_a_revision_when_the_model_is_local(tiny_bert, encoder):
    with pytest.raises(InvalidInputError, match="hub id"):
        resolve(tiny_bert, revision=COMMIT)
    with pytest.raises(InvalidInputError, match="hub id"):
        resolve(encoder, revision=COMMIT)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"batch": (8, 2, 16)}, "1 <= min <= opt <= max"),
        ({"length": (1, 2, 3)}, "'length'.*batch, sequence"),
        ({"sequence": (1, 64, 4096)}, "4096 tokens.*128 positions"),
        ({"sequence": (1, 2, 2)}, "special"),
        ({"batch": "many"}, r"\(min, opt, max\)"),
        ([("batch", 1)], "must map"),
    ],
)
def test_resolve_refuses_shapes_when_they_do_not_fit(tiny_bert, shapes, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve(tiny_bert, shapes=shapes)


def test_resolve_takes_ranges_when_shapes_gives_them(tiny_bert):
    signature = resolve(tiny_bert, shapes={"batch": (1, 2, 4), "sequence": (4, 16, 100)}).signature
    assert [str(dim) for dim in signature.dims] == ["batch 1..4 (opt 2)", "sequence 4..100 (opt 16)"]


def test_resolve_refuses_arguments_when_they_mean_nothing(tiny_bert, encoder, tokenizer):
    with pytest.raises(InvalidInputError, match="example="):
        resolve(tiny_bert, example={"input_ids": np.zeros((1, 2), np.int64)})
    with pytest.raises(InvalidInputError, match="labels="):
        resolve(encoder, tokenizer=tokenizer, labels=["a"])


@pytest.mark.parametrize("shown", [True, False])
def test_resolve_and_write_source_show_no_progress_bars_and_leave_them_as_they_were(tiny_bert, tmp_path, capfd, shown):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        resolve(tiny_bert).write_source(tmp_path / "source")
        assert "%|" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("cut", [1000, None])
def test_resolve_names_the_file_when_weights_are_truncated(tiny_bert, tmp_path, cut):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut] if cut else b"")
    with pytest.raises(IntegrityError, match=r"'model\.safetensors' is damaged or incomplete"):
        resolve(folder, task="text-classification")


def test_resolve_refuses_the_tokenizer_that_transformers_makes_up(tiny_bert, tmp_path):
    """AutoTokenizer makes one that knows special tokens only where a folder has none: every word would be unknown."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(tiny_bert) / name, folder / name)
    with pytest.raises(InvalidInputError, match=r"no tokenizer files|No tokenizer can be read"):
        resolve(folder, task="text-classification")


def test_resolve_refuses_labels_that_name_two_classes_alike(tiny_bert):
    with pytest.raises(InvalidInputError, match="labels has a name twice"):
        resolve(tiny_bert, task="text-classification", labels=["x", "x"])


@pytest.mark.parametrize("trusted", [False, True])
def test_resolve_downloads_no_pickles_from_a_hub_and_code_only_where_it_is_trusted(tiny_bert, monkeypatch, trusted):
    import huggingface_hub

    asked = {}

    def download(hub_id, **arguments):
        asked.update(arguments)
        return str(tiny_bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("owner/name", revision="0" * 40, trust_remote_code=trusted)
    wanted = [name for name in ("model.safetensors", "config.json", "pytorch_model.bin", "tf_model.h5", "model.py")
              if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])]  # fmt: skip
    assert wanted == ["model.safetensors", "config.json", *(["model.py"] if trusted else [])]
    assert asked["revision"] == "0" * 40


def test_resolve_explains_whatever_an_http_library_raises_without_a_network(monkeypatch):
    class ConnectError(Exception):
        """As httpx has it: no OSError, and no error of huggingface_hub."""

    def refuse(*args, **kwargs):
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(NotFoundError, match=r"'owner/model' is no local folder .*ConnectError: .* Check the name"):
        resolve("owner/model")
