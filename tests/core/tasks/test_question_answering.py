"""Questions are answered as by transformers 4's pipeline, and by its arithmetic written down another way."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.quality import answered
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, asker
from tests.served import pipeline_of, texts

TASK = "question-answering"
#: The last ones with the pipeline, and what they need where newer ones are installed.
OLD = ("transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1")


def asked(count):
    """Return questions about real and odd texts, some of them long."""
    some = [text for text in texts(count) if text.strip()]
    contexts = [" ".join(some[index : index + 1 + 7 * (index % 5 == 0)]) for index in range(len(some))]
    return [(f"What is {' '.join(text.split()[-3:])[:60]}?", text) for text in contexts][:count]


@pytest.fixture(scope="module", params=MODELS)
def both(request, minilm_path, tmp_path_factory):
    """A folder, and the pipeline of the model in it."""
    folder = asker(request.param, minilm_path, tmp_path_factory.mktemp("asker"))
    return folder, pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def bert(minilm_path, tmp_path_factory):
    folder = asker("bert", minilm_path, tmp_path_factory.mktemp("asker"))
    return pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


def expected(folder, questions, *, stride=64, longest=15, left=False):
    """Return the best spans (score, begin, end) of contexts: of all pairs of tokens, with the model itself."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for question, context in questions:
        pair, cut = ((context, question), "only_first") if left else ((question, context), "only_second")
        parts = tokenizer(
            *pair, truncation=cut, max_length=128, stride=stride, return_overflowing_tokens=True,
            return_offsets_mapping=True, padding=True, return_tensors="pt",
        )  # fmt: skip
        names = [name for name in tokenizer.model_input_names if name in parts]
        with torch.no_grad():
            output = model(**{name: parts[name] for name in names})
        found = {}
        for row in range(len(parts["input_ids"])):
            may = np.array([which == int(not left) for which in parts.sequence_ids(row)])
            among = may | (parts["input_ids"][row].numpy() == tokenizer.cls_token_id)
            begins, ends = (
                np.where(among, np.exp(logits[row].numpy().astype(np.float64)), 0.0)
                for logits in (output.start_logits, output.end_logits)
            )
            begins, ends = begins / begins.sum(), ends / ends.sum()
            for first, last in itertools.product(np.flatnonzero(may), repeat=2):
                if first <= last < first + longest:
                    span = int(parts["offset_mapping"][row][first][0]), int(parts["offset_mapping"][row][last][1])
                    found.setdefault(row, []).append((float(begins[first] * ends[last]), *span))
        yield [sorted(spans, reverse=True) for spans in found.values()]


def test_the_best_span_is_that_of_all_pairs_of_tokens(both):
    folder, ours = both
    questions = asked(40)
    got = ours(questions, {"align_to_words": False})
    several = 0
    for one, (_, context), parts in zip(got, questions, expected(folder, questions), strict=True):
        several += len(parts) > 1
        scores = {}  # the same words count together, whichever of the best of a part they are
        for score, begin, end in (part[0] for part in parts):
            scores[context[begin:end].lower()] = scores.get(context[begin:end].lower(), 0.0) + score
        assert one["score"] == pytest.approx(max(scores.values()), abs=2e-5)
        assert one["answer"] == context[one["start"] : one["end"]]
        assert scores[one["answer"].lower()] == pytest.approx(one["score"], abs=2e-5)
    assert several > 3


def test_a_tokenizer_that_pads_on_the_left_has_the_context_first(minilm_path, tmp_path):
    from transformers import AutoTokenizer

    folder = asker("bert", minilm_path, tmp_path / "asker")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    ours = pipeline_of(resolve(folder), tmp_path / "assets")
    questions = asked(20)
    got = ours(questions, {"align_to_words": False})
    for one, (_, context), parts in zip(got, questions, expected(folder, questions, left=True), strict=True):
        assert one["answer"] == context[one["start"] : one["end"]]
        if len(parts) == 1:
            assert one["score"] == pytest.approx(parts[0][0][0], abs=2e-5)


def test_a_graph_without_a_mask_answers_rows_of_different_lengths(bert):
    from mlflow_tdeploy.core.tasks import TASKS
    from mlflow_tdeploy.core.tensors import Signature

    signature = bert.task.signature
    ids = tuple(spec for spec in signature.inputs if spec.name == "input_ids")
    task = TASKS.get(TASK)(vars(bert.task.config), Signature(signature.dims, ids, signature.outputs), bert.task.assets)
    pairs = [("Who?", "Ann and Bob."), ("Who was it that came?", "It was Ann who came, and not Bob, they say.")]
    params = task.check_params({"align_to_words": False})
    encoded = task.encode(pairs, params)
    feeds = encoded.whole()
    assert list(feeds) == ["input_ids"]
    logits = np.zeros(feeds["input_ids"].shape, np.float32)
    for row, encoding in enumerate(encoded.encodings):
        logits[row, encoding.sequence_ids.index(1)] = 9  # the first token of the context
        logits[row, len(encoding.ids) :] = 99  # what padding says counts for nothing
    rows = task.decode({"start_logits": logits, "end_logits": logits}, feeds, 2, params)
    assert [one["answer"] for one in task.finish(task.answers(rows, encoded, params), params)] == ["Ann", "It"]


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    """An environment's folder with transformers 4."""
    folder = tmp_path_factory.mktemp("transformers-4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4 cannot be installed here: {done.stderr[-200:]}")
    return folder


@pytest.mark.slow
def test_predict_equals_the_pipeline_of_transformers_4(both, old):
    folder, ours = both
    cases = [
        (210, {}),
        (40, {"top_k": 3}),
        (40, {"top_k": 2, "align_to_words": False}),
        (40, {"max_answer_len": 3, "doc_stride": 10}),
        (40, {"max_seq_len": 64, "doc_stride": 5}),
        (40, {"handle_impossible_answer": True}),
    ]
    requests = [(*pair, params) for count, params in cases for pair in asked(count)]
    script = str(Path(__file__).with_name("old_pipeline.py"))
    environment = {**os.environ, "PYTHONPATH": str(old)}
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        input=json.dumps(requests),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = iter(json.loads(done.stdout))
    for count, params in cases:
        questions = asked(count)
        for pair, mine in zip(questions, ours(questions, params), strict=True):
            same(pair, [mine] if isinstance(mine, dict) else mine, next(theirs))


def same(pair, mine, wanted):
    wanted = [wanted] if isinstance(wanted, dict) else [one for one in wanted if one["score"] > 0]
    assert [one["score"] for one in mine] == pytest.approx([one["score"] for one in wanted], abs=2e-5), pair
    scores = {(one["answer"], one["start"], one["end"]): one["score"] for one in wanted}
    for one in mine:  # those of equal scores may change places
        assert scores[one["answer"], one["start"], one["end"]] == pytest.approx(one["score"], abs=2e-5), pair


def test_several_questions_are_asked_about_one_context(bert):
    context = "Paris is the capital of France. It lies on the Seine."
    got = bert({"question": ["What is Paris?", "Where does it lie?"], "context": context})
    assert [one["answer"] for one in got] == [context[one["start"] : one["end"]] for one in got]
    assert got == bert([("What is Paris?", context), ("Where does it lie?", context)])


def test_there_may_be_no_answer(bert):
    pair = [("What is Paris?", "Paris is the capital of France.")]
    (several,) = bert(pair, {"handle_impossible_answer": True, "top_k": 50})
    assert sum(one["answer"] == "" for one in several) == 1
    (usual,) = bert(pair, {"top_k": 50})
    assert all(one["answer"] for one in usual)
    assert bert([("What?", " \t ")]) == [{"score": 0.0, "start": 0, "end": 0, "answer": ""}]


@pytest.mark.parametrize(
    ("inputs", "params", "message"),
    [
        ([("q", "c"), ("", "c")], {}, "The question of item 1 is empty"),
        ([("q", "")], {}, "The context of item 0 is empty"),
        (["q"], {}, "Item 0 must have 'question' and 'context'"),
        ([("word " * 100, "word " * 100)], {}, "The question of item 0 has 100 tokens of 125"),
        ([("q", "c")], {"top_k": 0}, "top_k must be at least 1"),
        ([("q", "c")], {"max_seq_len": 4}, "max_seq_len must be from 5 to 128"),
        ([("q", "c")], {"max_seq_len": 129}, "max_seq_len must be from 5 to 128"),
        ([("q", "c")], {"doc_stride": 124}, "doc_stride must be from 0 to 123"),
        ([("q", "c"), ("q", "c \ud800")], {}, "Text 1 is not valid Unicode"),
        ([("q", "c"), ("word " * 100, "c \ud800")], {}, "Text 1 is not valid Unicode"),
    ],
)
def test_bad_requests_are_told_with_their_place(bert, inputs, params, message):
    with pytest.raises(InvalidInputError, match=message):
        bert(inputs, params)


def test_a_long_question_is_answered_where_its_context_fits(bert):
    (got,) = bert([("word " * 100, "a short text")])
    assert got["answer"] in "a short text"


def test_answers_are_scored_as_squad_has_them(bert):
    found = ["The  Seine!", "in Paris", "", "a cat"]
    right = [["seine"], ["Paris", "the city of Paris"], [""], ["dog", "that"]]
    assert answered(found, right) == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4)}
    task = bert.task
    answers = [{"answer": text} for text in found]
    labels = ["seine", {"text": ["Paris"], "answer_start": [3]}, [], ["dog"]]
    task.check_labels(labels)
    assert task.metric(answers, labels) == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4)}
    with pytest.raises(InvalidInputError, match="label 0 must be an answer"):
        task.check_labels([3.5])
    assert task.metric([{"answer": "in 1945"}], [1945])["f1"] == pytest.approx(2 / 3)
