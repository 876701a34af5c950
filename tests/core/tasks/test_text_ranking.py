"""Documents come in the order, and with the scores, of sentence-transformers' cross-encoder."""

from __future__ import annotations

import math

import pytest
import torch

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.quality import ranked
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, entailer, ranker
from tests.served import pipeline_of, texts

ACTIVATIONS = {"bert": torch.nn.Sigmoid(), "roberta": torch.nn.Identity(), "xlm-roberta": torch.nn.Sigmoid()}


@pytest.fixture(scope="module", params=MODELS)
def both(request, minilm_path, tmp_path_factory):
    """A cross-encoder, and our pipeline of the folder that it was saved to."""
    from sentence_transformers import CrossEncoder

    folder = ranker(request.param, minilm_path, tmp_path_factory.mktemp("ranker"))
    original = CrossEncoder(str(folder), device="cpu", activation_fn=ACTIVATIONS[request.param])
    saved = tmp_path_factory.mktemp("saved") / "model"
    original.save(str(saved))
    return original, pipeline_of(resolve(saved), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def bert(minilm_path, tmp_path_factory):
    folder = ranker("bert", minilm_path, tmp_path_factory.mktemp("ranker"))
    return pipeline_of(resolve(folder, task="text-ranking"), tmp_path_factory.mktemp("assets"))


def asked():
    some = texts(200)
    return [(some[begin], tuple(some[begin + 1 : begin + 2 + begin % 9])) for begin in range(0, len(some) - 12, 4)]


def same(mine, theirs):
    assert [one["score"] for one in mine] == pytest.approx([one["score"] for one in theirs], abs=2e-5, rel=1e-5)
    scores = {one["corpus_id"]: one["score"] for one in theirs}  # those of equal scores may change places
    assert [one["score"] for one in mine] == pytest.approx(
        [scores[one["corpus_id"]] for one in mine], abs=2e-5, rel=1e-5
    )


def test_documents_are_ranked_as_by_the_cross_encoder(both):
    original, ours = both
    questions = asked()
    assert sum(len(documents) for _, documents in questions) > 200
    for mine, (query, documents) in zip(ours(questions), questions, strict=True):
        same(mine, original.rank(query, documents))
    query, documents = questions[7]
    (mine,) = ours([(query, documents)], {"top_k": 2, "return_documents": True})
    theirs = original.rank(query, documents, top_k=2, return_documents=True)
    same(mine, theirs)
    assert [one["text"] for one in mine] == [documents[one["corpus_id"]] for one in mine]


def test_a_loaded_cross_encoder_is_ranked_by_and_keeps_what_becomes_of_its_scores(both, tmp_path):
    original, ours = both
    loaded = pipeline_of(resolve(original), tmp_path)
    assert loaded.task.name == "text-ranking"
    questions = asked()[:5]
    assert loaded(questions) == ours(questions)
    raw = [one["score"] for one in loaded(questions, {"function_to_apply": "none"})[0]]
    logits = original.predict([(questions[0][0], one) for one in questions[0][1]], activation_fn=torch.nn.Identity())
    assert raw == pytest.approx(sorted(logits.tolist(), reverse=True), abs=2e-5, rel=1e-5)


def test_a_folder_of_before_says_in_its_config_what_becomes_of_scores(minilm_path, tmp_path):
    import json

    folder = ranker("bert", minilm_path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, value in (
        ("sbert_ce_default_activation_function", "torch.nn.modules.linear.Identity"),
        ("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        source = resolve(folder)
        assert (source.task, source.task_config["function_to_apply"]) == ("text-ranking", "none")
    (folder / "config.json").write_text(json.dumps({**config, "sentence_transformers": {"activation_fn": "my.Own"}}))
    with pytest.raises(InvalidInputError, match=r"scores go through 'my.Own'"):
        resolve(folder, task="text-ranking")


def test_a_model_of_several_classes_ranks_nothing(minilm_path, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = entailer("bert", minilm_path, tmp_path / "source")
    with pytest.raises(InvalidInputError, match="needs a model with one score, and this one has 3 classes"):
        resolve(folder, task="text-ranking")
    pairs = [("a cat", "an animal"), ("it rains", "the sun shines")]
    for activation in (torch.nn.Identity(), torch.nn.Softmax(dim=-1)):
        original = CrossEncoder(str(folder), device="cpu", activation_fn=activation)
        saved = tmp_path / type(activation).__name__
        original.save(str(saved))
        scores = original.predict(pairs)
        for model in (original, saved):
            source = resolve(model)
            assert (source.task, source.task_config["pairs"]) == ("text-classification", True)
            answers = pipeline_of(source, tmp_path / f"assets-{len(list(tmp_path.iterdir()))}")(pairs, {"top_k": 0})
            for row, answer in zip(scores, answers, strict=True):
                assert [one["score"] for one in answer] == pytest.approx(sorted(row.tolist(), reverse=True), abs=2e-5)


def test_a_cross_encoder_with_a_prompt_is_refused(minilm_path, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = ranker("bert", minilm_path, tmp_path / "source")
    original = CrossEncoder(str(folder), device="cpu", prompts={"q": "query: "}, default_prompt_name="q")
    original.save(str(tmp_path / "saved"))
    for model in (original, tmp_path / "saved"):
        with pytest.raises(InvalidInputError, match="puts its default prompt 'query: ' before every text"):
            resolve(model)


@pytest.mark.parametrize(
    ("inputs", "params", "message"),
    [
        (["a"], {}, "Item 0 must have 'query' and 'documents'"),
        ([("q", [])], {}, "Documents of item 0 must be a list of at least one text"),
        ([("q", ["a", "b", "c"]), ("q", ["a", "b \ud800"])], {}, "Text 1 is not valid Unicode"),
        ([("q", ["a"]), ("q", ["a", None])], {}, "Documents of item 1: text 1 is missing"),
        ([("q", ["a"])], {"top_k": -1}, "top_k must be at least 1"),
        ([("q", ["a"])], {"function_to_apply": "softmax"}, "must be one of sigmoid, none"),
    ],
)
def test_bad_requests_are_told_with_their_place(bert, inputs, params, message):
    with pytest.raises(InvalidInputError, match=message):
        bert(inputs, params)


def test_orders_are_scored():
    assert ranked([[0, 1, 2]], [{0}]) == {"mrr": 1.0, "ndcg": 1.0}
    assert ranked([[2, 1, 0]], [{0}]) == {"mrr": pytest.approx(1 / 3), "ndcg": pytest.approx(1 / math.log2(4))}
    both = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert ranked([[2, 1, 0]], [{0, 1}]) == {"mrr": 0.5, "ndcg": pytest.approx(both)}
    assert ranked([[1], [0]], [{0}, {0}]) == {"mrr": 0.5, "ndcg": 0.5}


def test_labels_are_places(bert):
    answers = bert([("q", ["a", "b", "c"])])
    first, last = answers[0][0]["corpus_id"], answers[0][2]["corpus_id"]
    assert bert.task.metric(answers, [first]) == {"mrr": 1.0, "ndcg": 1.0}
    assert bert.task.metric(answers, [[last]])["mrr"] == pytest.approx(1 / 3)
    bert.task.check_labels([0, [1, 2.0]], [("q", ("a",)), ("q", ("a", "b", "c"))])
    with pytest.raises(InvalidInputError, match="label 1 is the place 3, and item 1 has 3 documents"):
        bert.task.check_labels([0, 3], [("q", ("a",)), ("q", ("a", "b", "c"))])
    for wrong in ("a", -1, [], True, 0.5):
        with pytest.raises(InvalidInputError, match="label 0 must be the place"):
            bert.task.check_labels([wrong])
