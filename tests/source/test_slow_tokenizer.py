"""Models whose tokenizer transformers has in Python only: held against transformers' pipelines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from mlflow.exceptions import MlflowException
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from transformers import (
    BertConfig,
    BertJapaneseTokenizer,
    CanineTokenizer,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    PhobertTokenizer,
    RoCBertConfig,
    RoCBertModel,
    RoCBertTokenizer,
)

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, ManifestError, MissingDependencyError
from mlflow_tdeploy.core.tasks import _slow_tokenizer
from mlflow_tdeploy.core.tasks._slow_tokenizer import SlowTokenizer
from mlflow_tdeploy.deploy.choose import choose
from mlflow_tdeploy.deploy.found import LoggedBundle
from mlflow_tdeploy.deploy.settings import DeploySettings
from mlflow_tdeploy.flavor.requirements import get_default_pip_requirements
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle
from tests.served import close_to, pipeline_of, task_of, texts

PROTEINS = ["MKTVRQERLKSIVRILERSKEPVSGAQ<mask>AEELSV", "MKT<mask>RQ", "<mask>", "M" * 90 + "<mask>"]


@pytest.fixture(scope="module")
def japanese(tokenizer, tmp_path_factory):
    """Return the class of tokenizer that Japanese BERTs have, of whole words and word pieces."""
    vocabulary = tmp_path_factory.mktemp("slow") / "vocab.txt"
    words = sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])
    vocabulary.write_text("\n".join(word for word, _ in words), encoding="utf-8")
    return BertJapaneseTokenizer(str(vocabulary), do_lower_case=True, model_max_length=64)


def _model(small, auto_class):
    torch.manual_seed(5)
    labels = {"contradiction": 0, "so": 1, "entailment": 2}
    config = BertConfig(**small, initializer_range=0.3, id2label=dict(enumerate(labels)), label2id=labels)
    return getattr(transformers, auto_class).from_config(config).eval()


@pytest.mark.parametrize(
    ("task", "auto_class", "asked"),
    [
        ("text-classification", "AutoModelForSequenceClassification", {"top_k": None}),
        ("zero-shot-classification", "AutoModelForSequenceClassification", {"candidate_labels": ["animal", "a plant"]}),
        ("feature-extraction", "AutoModel", {}),
    ],
)
def test_answers_are_those_of_the_pipeline(japanese, small, tmp_path, task, auto_class, asked):
    model = _model(small, auto_class)
    cut = {"tokenize_kwargs": {"truncation": True}} if task == "feature-extraction" else {"truncation": True}
    cut = {} if task.startswith("zero") else cut
    pipe = transformers.pipeline(task, model=model, tokenizer=japanese, **cut)
    given = texts(200)
    given = [text for text in given if text.strip()] if task.startswith("zero") else given
    given = given if task != "zero-shot-classification" else given[:40]
    ours = pipeline_of(resolve(model, task=task, tokenizer=japanese), tmp_path)
    params = {**asked, "top_k": 0} if "top_k" in asked else asked
    for text, mine, theirs in zip(given, ours(given, params), (pipe(text, **asked) for text in given), strict=True):
        if task == "feature-extraction":
            np.testing.assert_allclose(mine, np.array(theirs), atol=1e-4)
        elif task == "text-classification":
            assert mine == close_to(theirs[0] if isinstance(theirs[0], list) else theirs), text
        else:
            assert mine == close_to(theirs), text


def test_fillings_are_those_of_the_pipeline(japanese, small, tmp_path):
    model = _model(small, "AutoModelForMaskedLM")
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=japanese, tokenizer_kwargs={"truncation": True})
    ours = pipeline_of(resolve(model, task="fill-mask", tokenizer=japanese), tmp_path)
    given = ["a film about [MASK] and more.", "[MASK] it is", "two [MASK] of [MASK]"]
    assert ours(given) == [close_to(pipe(text)) for text in given]


def test_proteins_are_filled_as_the_pipeline_fills_them(tmp_path):
    alphabet = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(alphabet))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"), model_max_length=128)
    torch.manual_seed(6)
    model = EsmForMaskedLM(
        EsmConfig(
            vocab_size=len(alphabet), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=130, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary",
            initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    ours = pipeline_of(resolve(model, task="fill-mask", tokenizer=tokenizer), tmp_path)
    assert ours(PROTEINS) == [close_to(pipe(text)) for text in PROTEINS]


@pytest.fixture(scope="module")
def logged(japanese, small, tmp_path_factory):
    """Return the folder of a logged classifier, and what it answers."""
    folder = tmp_path_factory.mktemp("logged") / "model"
    model = _model(small, "AutoModelForSequenceClassification")
    mlflow_tdeploy.save_model(model, folder, tokenizer=japanese, shapes={"sequence": (3, 16, 64)})
    return folder


@pytest.fixture
def copied(logged, tmp_path):
    shutil.copytree(logged, tmp_path / "model")
    return tmp_path / "model"


def test_transformers_becomes_a_requirement_of_that_model_only(logged, tokenizer, small, tmp_path):
    lines = (logged / "requirements.txt").read_text().splitlines()
    assert f"transformers=={transformers.__version__}" in lines
    assert not any(line.startswith("torch") for line in lines)
    other = _model(small, "AutoModelForSequenceClassification")
    mlflow_tdeploy.save_model(other, tmp_path / "other", tokenizer=tokenizer, precisions=["fp32"])
    assert "transformers" not in (tmp_path / "other" / "requirements.txt").read_text()


def test_many_threads_are_answered_as_one_is(logged):
    with mlflow_tdeploy.load_model(str(logged)) as loaded:
        alone = loaded.predict(texts(64))
        assert not loaded.decision.failures
        with ThreadPoolExecutor(8) as pool:
            assert all(answer == close_to(alone) for answer in pool.map(loaded.predict, [texts(64)] * 8))


def test_a_host_without_torch_answers_the_same(logged):
    with mlflow_tdeploy.load_model(str(logged)) as loaded:
        here = loaded.predict(["a film", "and more"])
    code = (
        "import json, sys; sys.modules['torch'] = None; import mlflow_tdeploy; "
        f"print(json.dumps(mlflow_tdeploy.load_model({str(logged)!r}).predict(['a film', 'and more'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == close_to(here)


def test_one_thread_at_a_time_is_within_the_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "M"]))
    theirs, within, most = EsmTokenizer(str(tmp_path / "vocab.txt")), [], []
    real = EsmTokenizer.tokenize

    def slowly(self, text, *more, **keywords):
        within.append(text)
        most.append(len(within))
        time.sleep(0.002)
        within.pop()
        return real(self, text, *more, **keywords)

    monkeypatch.setattr(EsmTokenizer, "tokenize", slowly)
    both = [SlowTokenizer(theirs, 16, "longest_first"), SlowTokenizer(theirs, 16, "longest_first")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda place: both[place % 2].encode("MM"), range(40)))
    assert set(most) == {1}


def test_what_the_host_lacks_is_not_the_texts_fault(logged, monkeypatch):
    def gone(self, text, *more, **keywords):
        raise OSError("the analyser has died")

    with mlflow_tdeploy.load_model(str(logged)) as loaded:
        monkeypatch.setattr(BertJapaneseTokenizer, "_tokenize", gone)
        with pytest.raises(OSError, match="has died"):
            loaded.predict(["a film"], errors="null")


def test_a_class_whose_library_is_not_here_is_asked_for(japanese, small, tmp_path, monkeypatch):
    class Placeholder:
        _backends = ("sentencepiece",)

    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "BertJapaneseTokenizer", Placeholder)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        task.prepare()


def test_texts_that_it_cannot_read_are_named_and_can_be_left_out(logged, monkeypatch):
    real = BertJapaneseTokenizer._tokenize

    def failing(self, text, *more, **keywords):
        if "shark" in text:
            raise RuntimeError("input is too long")
        return real(self, text, *more, **keywords)

    monkeypatch.setattr(BertJapaneseTokenizer, "_tokenize", failing)
    with mlflow_tdeploy.load_model(str(logged)) as loaded:
        with pytest.raises(MlflowException, match="cannot read text 1 .RuntimeError: input is too long.: 'a shark'"):
            loaded.predict(["a film", "a shark"])
        with pytest.raises(MlflowException, match="Text 1 is not valid Unicode"):
            loaded.predict(["fine", "\ud800"])
        found = loaded.predict(["a film", "a shark"], errors="null")
        assert found == [close_to(loaded.predict(["a film"])[0]), None]


@pytest.mark.parametrize(
    ("said", "more", "told"),
    [
        ({"tokenizer_class": "AutoConfig"}, {}, "'AutoConfig', which is no tokenizer"),
        ({"tokenizer_class": "GenerationConfig"}, {}, "'GenerationConfig', which is no tokenizer"),
        ({"tokenizer_class": "os.system"}, {}, "'os.system', which is no tokenizer"),
        ({"tokenizer_class": "BertTokenizer"}, {}, "'BertTokenizer', which is no tokenizer"),
        ({"tokenizer_class": "PreTrainedTokenizer"}, {}, "'PreTrainedTokenizer', which is no tokenizer"),
        ({"vocab": "/etc/passwd"}, {}, r"has vocab \("),
        ({"gguf_file": "/etc/passwd"}, {}, "has gguf_file"),
        ({"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}, {}, "has fast_tokenizer_files"),
        ({"mecab_kwargs": {"mecab_dic": None}}, {}, "has mecab_kwargs.mecab_dic"),
        ({"sudachi_kwargs": {"sudachi_config_path": "sudachi.json"}}, {}, "has sudachi_kwargs.sudachi_config_path"),
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, {}, "has auto_map"),
        ({"mecab_kwargs": {"mecab_option": "-d /tmp/evil"}}, {}, "has mecab_kwargs.mecab_option"),
        ({}, {"config.json": '{"model_type": "qwen2"}'}, "'config.json' lies among"),
        ({}, {"evil.py": "raise SystemExit"}, "'evil.py' lies among"),
    ],
)
def test_files_that_somebody_else_has_made_run_no_code_of_theirs(japanese, small, tmp_path, said, more, told):
    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    for name, content in more.items():
        (tmp_path / "tokenizer" / name).write_text(content)
    with pytest.raises(IntegrityError, match=told):
        task.prepare()


def test_a_file_that_is_none_of_the_tokenizers_is_refused_with_the_model(copied):
    (copied / "tdeploy" / "assets" / "tokenizer" / "merges.txt").write_text("a b")
    with pytest.raises(MlflowException, match=r"merges.txt' lies among the model's assets"):
        mlflow_tdeploy.load_model(str(copied))


@pytest.mark.parametrize("packages", [["evil"], ["transformers", "evil @ https://evil.example/x.whl"], ["sacremoses"]])
def test_records_cannot_make_anything_else_a_requirement(japanese, small, tmp_path, packages):
    source = resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese)
    source.task_config["tokenizer_packages"] = packages
    with pytest.raises(ManifestError, match="tokenizer_packages must be transformers and others of"):
        task_of(source, tmp_path)
    with pytest.raises(InvalidInputError, match="packages by their names"):
        get_default_pip_requirements(packages=["--extra-index-url https://evil.example"])


def test_records_of_a_task_about_places_are_refused(japanese, tokenizer, small, tmp_path):
    source = resolve(_model(small, "AutoModelForTokenClassification"), tokenizer=tokenizer)
    source.task_config["tokenizer_packages"] = ["transformers"]
    with pytest.raises(InvalidInputError, match="says where in a text its answers are"):
        task_of(source, tmp_path)


def test_a_model_that_takes_more_of_what_it_makes_is_refused(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for name in ("shape", "pronunciation"):
        (tmp_path / f"{name}.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    tokenizer = RoCBertTokenizer(
        str(tmp_path / "vocab.txt"), str(tmp_path / "shape.json"), str(tmp_path / "pronunciation.json")
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RoCBertModel(RoCBertConfig(vocab_size=20, pronunciation_vocab_size=20, shape_vocab_size=20, **sizes))
    with pytest.raises(InvalidInputError, match="also makes 'input_pronunciation_ids', which the model takes"):
        resolve(model, task="feature-extraction", tokenizer=tokenizer)


def test_what_words_became_is_not_remembered_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(_slow_tokenizer, "_REMEMBERED", 5)
    (tmp_path / "vocab.txt").write_text("\n".join(f"{letter} 1" for letter in "abcdefgh"))
    (tmp_path / "bpe.codes").write_text("a b 5\n")
    theirs = PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    ours = SlowTokenizer(theirs, 16, "longest_first")
    for word in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "ha", "hb", "hc"):
        assert ours.encode(word).ids == theirs(word)["input_ids"]
    assert len(theirs.cache) <= 6


def test_an_unknown_word_is_no_special_token(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "M"]))
    ours = SlowTokenizer(EsmTokenizer(str(tmp_path / "vocab.txt")), 16, "longest_first")
    assert ours.encode("a").special_tokens_mask == [1, 0, 1]


def test_sentences_and_graphs_have_it_too(japanese, small, tmp_path):
    model = _model(small, "AutoModel")
    model.save_pretrained(tmp_path / "tiny")
    japanese.save_pretrained(tmp_path / "tiny")
    sentences = SentenceTransformer(modules=[Transformer(str(tmp_path / "tiny")), Pooling(32)], device="cpu")
    given = ["one", "two words", "and a third text"]
    got = pipeline_of(resolve(sentences), tmp_path / "sentences")(given)
    np.testing.assert_allclose(got, sentences.encode(given), atol=1e-5)
    mlflow_tdeploy.save_model(
        model, tmp_path / "model", task="feature-extraction", tokenizer=japanese, precisions=["fp32"]
    )
    graph = next((tmp_path / "model" / "tdeploy").rglob("onnx-fp32/*.onnx"))
    source = resolve(graph, task="feature-extraction", tokenizer=japanese)
    with mlflow_tdeploy.load_model(str(tmp_path / "model")) as loaded:
        for mine, theirs in zip(pipeline_of(source, tmp_path / "graph")(given), loaded.predict(given), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    source.close()


def test_what_is_kept_of_it_names_no_place_of_this_machine(japanese, small, tmp_path):
    task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    said = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "BertJapaneseTokenizer"
    assert not {"name_or_path", "auto_map"} & set(said)
    assert not any(isinstance(value, str) and value.startswith("/") for value in said.values())


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("token-classification", "AutoModelForTokenClassification"),
        ("question-answering", "AutoModelForQuestionAnswering"),
    ],
)
def test_tasks_about_places_in_texts_refuse_it(japanese, small, task, auto_class):
    with pytest.raises(InvalidInputError, match="does not know where in a text its tokens are"):
        resolve(_model(small, auto_class), task=task, tokenizer=japanese)


def test_a_tokenizer_of_the_users_own_is_refused(small):
    class Mine(CanineTokenizer):
        pass

    with pytest.raises(InvalidInputError, match="not of transformers: a serving host would have to run its code"):
        resolve(_model({**small, "vocab_size": 0x110000}, "AutoModel"), tokenizer=Mine())


def test_a_server_without_transformers_is_told_of(japanese, small, tmp_path, monkeypatch):
    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        task.prepare()


def test_damaged_files_are_told_of(japanese, small, tmp_path):
    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    (tmp_path / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(IntegrityError, match="Cannot read the tokenizer's files"):
        task.prepare()


def test_triton_is_refused_before_anything_is_brought_there(logged):
    def fetch(variant):
        raise AssertionError("files were fetched")

    known = LoggedBundle("tdeploy", Bundle.open(logged), fetch)
    for look in (True, False):
        with pytest.raises(InvalidInputError, match="Triton's Python has none"):
            choose("models:/mine/1", DeploySettings(), name="mine", version=1, known=known, look=look)


def test_a_dictionary_of_this_machine_is_refused(japanese, small, tmp_path):
    japanese.save_pretrained(tmp_path)
    there = {"mecab_option": "-d /usr/lib/mecab/dic/neologd"}
    other = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), mecab_kwargs=there)
    with pytest.raises(InvalidInputError, match=r"reads a dictionary of this machine \(mecab_kwargs.mecab_option\)"):
        resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=other)
