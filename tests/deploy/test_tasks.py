"""Models of tasks with several texts an item, or lists among parameters and in answers: deployed and asked."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from tests.core.tasks.image_models import written
from tests.core.tasks.token_models import asker, entailer, filler, ranker, tagger
from tests.pictures import opened, pictures
from tests.served import close_to

ASKED = {
    "token-classification": (tagger, ["Alice met Bob.", "so it is"], {"ignore_labels": ["O", "B-ORG"]}),
    "fill-mask": (filler, ["the <mask> sat", "a <mask> of <mask>"], {"targets": ["a", "of", "the"]}),
    "text-classification": (entailer, [("a cat", "an animal"), ("it rains", "the sky")], {"top_k": 0}),
    "question-answering": (
        asker,
        {"question": ["What sat?", "Where?"], "context": "The cat sat on the mat. " * 30},
        {"top_k": 2, "doc_stride": 8},
    ),
    "text-ranking": (
        ranker,
        {"query": ["the cat", "the sky"], "documents": [["a cat", "a dog", "it rains"], ["it is blue"]]},
        {"return_documents": True},
    ),
    "zero-shot-classification": (entailer, ["the cat sat", "it rains"], {"candidate_labels": ["animals", "weather"]}),
}


@pytest.mark.parametrize("task", ASKED)
def test_it_is_deployed_and_answers_as_the_loader_does(client, running, minilm_path, tmp_path, task):
    write, given, params = ASKED[task]
    kind = "roberta" if task == "fill-mask" else "bert"  # of few words: scores of all are compared
    source = write(kind, minilm_path, tmp_path / "source")
    shapes = {"batch": (1, 4, 8), "sequence": (3, 16, 64)}
    mlflow_tdeploy.save_model(source, tmp_path / "model", task=task, precisions=["fp32"], shapes=shapes)
    client.create_deployment("m", str(tmp_path / "model"), config={"device": "cpu"})
    expected = mlflow_tdeploy.load_model(str(tmp_path / "model")).predict(given, params)
    for target in (f"tdeploy://127.0.0.1:{running[0].http}", f"tdeploy://127.0.0.1:{running[0].grpc}?protocol=grpc"):
        found = get_deploy_client(target).predict("m", given, params=params)
        assert found["predictions"] == close_to(expected)
        assert len(found.get_predictions()) == 2


def test_what_cannot_be_used_is_answered_by_none_through_the_client_too(client, running, minilm_path, tmp_path):
    source = asker("bert", minilm_path, tmp_path / "source")
    shapes = {"batch": (1, 4, 8), "sequence": (3, 16, 64)}
    mlflow_tdeploy.save_model(source, tmp_path / "model", precisions=["fp32"], shapes=shapes)
    client.create_deployment("m", str(tmp_path / "model"), config={"device": "cpu", "front_batch_size": 2})
    given = [("Who?", "Ann."), ("Who?", "Bob."), ("Who?", ""), ("Who?", None), ("Who?", "\ud800"), ("Who?", "It.")]
    with pytest.raises(MlflowException):
        client.predict("m", given)
    found = client.predict("m", given, params={"errors": "null"})["predictions"]
    expected = mlflow_tdeploy.load_model(str(tmp_path / "model")).predict(given, {"errors": "null"})
    assert [one is None for one in expected] == [False, False, True, True, True, False]
    assert found == close_to(expected)


@pytest.mark.parametrize("head", [True, False])
def test_a_model_of_images_is_deployed_and_answers_as_the_loader_does(client, running, tmp_path, head):
    source = written("vit", tmp_path / "source", head=head)
    mlflow_tdeploy.save_model(source, tmp_path / "model", precisions=["fp32"], shapes={"batch": (1, 4, 8)})
    client.create_deployment("m", str(tmp_path / "model"), config={"device": "cpu"})
    loaded, files = mlflow_tdeploy.load_model(str(tmp_path / "model")), pictures(10)
    params = {"top_k": 3} if head else {"pool": True}
    expected = loaded.predict(files, params)
    coded = [base64.b64encode(file) for file in files]
    texts = [one.decode() for one in coded]
    for target in (f"tdeploy://127.0.0.1:{running[0].http}", f"tdeploy://127.0.0.1:{running[0].grpc}?protocol=grpc"):
        asked = get_deploy_client(target)
        for given in (files, {"image": files}, [opened(file) for file in files], coded, texts):
            found = asked.predict("m", given, params=params)["predictions"]
            if head:
                assert found == close_to(expected)
            else:
                np.testing.assert_allclose(found, expected, atol=1e-5)
    cut = files[1][: len(files[1]) // 2]
    with pytest.raises(MlflowException, match="Image 1 cannot be decoded"):
        client.predict("m", [files[0], cut])
    found = client.predict("m", [files[0], cut, "x", None, files[2]], params={"errors": "null"})["predictions"]
    assert [one is None for one in found] == [False, True, True, True, False]


def test_requests_have_no_more_bytes_than_servers_take(monkeypatch):
    from mlflow_tdeploy.deploy import ask

    rows = [b"a" * 10, b"b" * 10, b"c" * 30, b"d", b"e"]
    array = np.array(rows, object).reshape(-1, 1)
    monkeypatch.setattr(ask, "_BYTES", 20)
    parts = [list(part["image"].ravel()) for part in ask._parts({"image": array}, 3)]
    assert parts == [rows[:2], rows[2:3], rows[3:]]
    monkeypatch.setattr(ask, "_BYTES", 10**9)
    assert [len(part["image"]) for part in ask._parts({"image": array}, 2)] == [2, 2, 1]


def test_columns_are_told_without_what_is_as_usual():
    from mlflow_tdeploy.core.tasks import TASKS
    from mlflow_tdeploy.triton.bundle_version import _as_told

    told = {name: [_as_told(column) for column in TASKS.get(name).columns] for name in TASKS.names()}
    assert all("kind" not in column for name, some in told.items() if "image" not in name for column in some)
    assert told["image-classification"] == [{"name": "image", "others": ["images", "inputs", "img"], "kind": "image"}]
