"""Models as people write them: each is logged, verified at every size, and answers as it did before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle

RANDOM = np.random.default_rng(0)


class Forecast(torch.nn.Module):
    """The last step of each series, whose length is said."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(4, 8, batch_first=True), torch.nn.Linear(8, 1)

    def forward(self, x, lengths):
        steps, _ = self.lstm(x)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, steps.shape[2])
        return self.head(steps.gather(1, last).squeeze(1)).squeeze(-1)


class Graph(torch.nn.Module):
    """One step of messages along edges between nodes."""

    def __init__(self):
        super().__init__()
        self.own, self.out = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, x, edges):
        nodes = self.own(x)
        return self.out(torch.relu(nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])))


class Totals(torch.nn.Module):
    """Besides an answer per row, one number for all."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x):
        y = self.linear(x)
        return y, y.argmax(1), y.sum()


class Table(torch.nn.Module):
    """Inputs called as an operator is."""

    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList([torch.nn.Embedding(n, 4) for n in (5, 12)])
        self.out = torch.nn.Linear(14, 1)

    def forward(self, cat, linear):
        return self.out(torch.cat([*(table(cat[:, i]) for i, table in enumerate(self.tables)), linear], 1))


def floats(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


ORDINARY = {
    "lengths": (
        Forecast,
        {"x": floats(8, 24, 4), "lengths": RANDOM.integers(8, 25, 8)},
        {"x.1": "time", "time": (4, 24, 48)},
    ),
    "edges": (
        Graph,
        {"x": floats(20, 8), "edges": RANDOM.integers(0, 20, (2, 60))},
        {"edges.0": 2, "edges.1": "edges", "edges": (1, 60, 200), "batch": (1, 20, 50)},
    ),
    "totals": (Totals, {"x": floats(4, 3)}, None),
    "names": (Table, {"cat": np.stack([RANDOM.integers(0, n, 64) for n in (5, 12)], 1), "linear": floats(64, 6)}, None),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_model_is_logged_and_answers(name, tmp_path):
    kind, example, shapes = ORDINARY[name]
    torch.manual_seed(0)
    module = kind().eval()
    mlflow_tdeploy.save_model(
        module, tmp_path / "model", task="tensors", example=example, shapes=shapes, precisions=["fp32"]
    )
    loaded = mlflow_tdeploy.load_model(tmp_path / "model")
    with torch.no_grad():
        expected = module(**{key: torch.from_numpy(value) for key, value in example.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(loaded.infer(example).values(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


class Causal(torch.nn.Module):
    """A language model of torch's own layers, whose mask is made of the length, or kept for the longest."""

    def __init__(self, kept):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.layers = torch.nn.Embedding(90, 16), torch.nn.TransformerEncoder(layer, 2)
        self.head, self.kept = torch.nn.Linear(16, 90), kept
        self.register_buffer("mask", torch.triu(torch.ones(64, 64, dtype=torch.bool), 1))

    def forward(self, ids):
        n = ids.shape[1]
        mask = self.mask[:n, :n] if self.kept else torch.nn.Transformer.generate_square_subsequent_mask(n)
        return self.head(self.layers(self.embed(ids), mask=mask))


class Translation(torch.nn.Module):
    """Encoder and decoder, with padding and a causal mask."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(90, 16)
        self.layers = torch.nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        self.head = torch.nn.Linear(16, 90)

    def forward(self, src, tgt, src_pad):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        both = self.embed(src), self.embed(tgt)
        return self.head(
            self.layers(*both, tgt_mask=mask, src_key_padding_mask=src_pad, memory_key_padding_mask=src_pad)
        )


@pytest.mark.parametrize("kept", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_causal_model_of_torchs_layers_is_logged_at_every_length(kept, tmp_path):
    shapes = {"ids.1": "length", "length": (2, 10, 32)}
    model = Causal(kept).eval()
    example = {"ids": RANDOM.integers(0, 90, (3, 10))}
    mlflow_tdeploy.save_model(model, tmp_path / "m", example=example, shapes=shapes, precisions=["fp32"])
    with mlflow_tdeploy.load_model(str(tmp_path / "m"), model_config={"variant": "onnx-fp32"}) as served:
        for length in (2, 7, 32):
            ids = RANDOM.integers(0, 90, (2, length))
            (answer,) = served.infer({"ids": ids}).values()
            np.testing.assert_allclose(answer, model(torch.from_numpy(ids)).detach().numpy(), atol=1e-5)


def test_torchs_encoder_and_decoder_are_logged_whatever_the_padding_is_called(tmp_path):
    example = {
        "src": RANDOM.integers(0, 90, (3, 10)), "tgt": RANDOM.integers(0, 90, (3, 7)),
        "src_pad": np.arange(10)[None] >= np.array([[10], [4], [7]]),
    }  # fmt: skip
    shapes = {"src.1": "s", "src_pad.1": "s", "s": (1, 10, 32), "tgt.1": "t", "t": (2, 7, 32)}
    mlflow_tdeploy.save_model(Translation(), tmp_path / "m", example=example, shapes=shapes, precisions=["fp32"])
    assert latest_accuracy(Bundle.open(tmp_path / "m" / "tdeploy").evidence("onnx-fp32")).passed


class Hours(torch.nn.Module):
    """Looks hours of a day up in what is no table of torch's."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(26, 3)

    def forward(self, x, hour):
        hours = torch.nn.functional.one_hot(hour, 24).float()
        return self.linear(torch.cat([x, hours], dim=-1)).mean(1)


def test_hours_that_rise_in_the_example_stay_within_a_day(tmp_path):
    example = {"x": RANDOM.standard_normal((2, 24, 2)).astype(np.float32), "hour": np.tile(np.arange(24), (2, 1))}
    shapes = {"x.1": "time", "hour.1": "time", "time": (1, 24, 168)}
    mlflow_tdeploy.save_model(Hours(), tmp_path / "m", example=example, shapes=shapes, precisions=["fp32"])
    bundle = Bundle.open(tmp_path / "m" / "tdeploy")
    assert bundle.task().config.repeated == ("hour",)
    assert any("time=168" in shape for shape in latest_accuracy(bundle.evidence("onnx-fp32")).shapes)


def test_positions_are_found_by_trying():
    for name, found in (("lengths", {"lengths": {"lengths": "time"}}), ("edges", {"positions": {"edges": "batch"}})):
        kind, example, shapes = ORDINARY[name]
        assert resolve(kind().eval(), example=example, shapes=shapes).task_config == found


class Rated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = torch.nn.Embedding(1000, 8), torch.nn.Embedding(50, 8)

    def forward(self, user, item):
        return (self.user(user) * self.item(item)).sum(1)


class WithTypes(torch.nn.Module):
    """Types, positions and a mask of its own, as BERT has them."""

    def __init__(self):
        super().__init__()
        self.word, self.kind, self.place = (torch.nn.Embedding(n, 8) for n in (1000, 2, 64))

    def forward(self, ids, attention_mask):
        own = torch.zeros_like(ids), torch.arange(ids.shape[1]).expand(ids.shape)
        return (self.word(ids) + self.kind(own[0]) + self.place(own[1])) * attention_mask[..., None]


@pytest.mark.parametrize("ids", [np.zeros((1, 16), np.int64), np.ones((1, 16), np.int64), np.arange(16)[None]])
def test_a_table_is_told_from_what_only_looks_alike(ids):
    example = {"ids": ids, "attention_mask": np.ones_like(ids)}
    assert resolve(WithTypes(), example=example).task_config == {"integer_ranges": {"ids": 1000}}


def test_tables_of_inputs_that_are_alike_in_the_example_are_their_own():
    example = {"user": np.arange(16), "item": np.arange(16)}
    assert resolve(Rated(), example=example).task_config == {"integer_ranges": {"user": 1000, "item": 50}}


class NeedsEnd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word = torch.nn.Embedding(100, 8)

    def forward(self, ids):
        if (ids == 2).sum(1).min() != 1:
            raise ValueError("every row needs one end")
        return self.word(ids).mean(1)


def test_a_table_that_the_model_does_not_take_whole_is_not_asked_whole():
    ids = RANDOM.integers(4, 100, (4, 12))
    ids[:, -1] = 2
    assert "integer_ranges" not in resolve(NeedsEnd(), example={"ids": ids}).task_config


class Refuses(torch.nn.Module):
    def forward(self, x):
        if x.shape[1] > 40:
            raise ValueError("too long")
        return x.cumsum(1)


def test_a_size_that_the_model_cannot_take_is_still_refused(tmp_path):
    with pytest.raises(MlflowException, match=r"time=\d+.*bounds that are multiples"):
        mlflow_tdeploy.save_model(
            Refuses(),
            tmp_path / "model",
            task="tensors",
            example={"x": floats(2, 20)},
            shapes={"x.1": "time", "time": (8, 20, 64)},
            precisions=["fp32"],
        )


def test_torchs_own_encoder_is_held_against_what_it_computes_at_padded_positions_too(tmp_path):
    """Its fast path leaves padded positions out; nobody reads them, and the export is right."""

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = torch.nn.Embedding(100, 16), torch.nn.Linear(16, 9)
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = torch.nn.TransformerEncoder(layer, 2)

        def forward(self, ids, pad_mask):
            return self.out(self.encoder(self.embedding(ids), src_key_padding_mask=pad_mask))

    torch.manual_seed(0)
    example = {
        "ids": np.random.default_rng(0).integers(0, 100, (3, 10)),
        "pad_mask": np.arange(10)[None] >= np.array([[10], [4], [7]]),
    }
    shapes = {"ids.1": "seq", "pad_mask.1": "seq", "seq": (1, 10, 64)}
    before = torch.backends.mha.get_fastpath_enabled()
    mlflow_tdeploy.save_model(
        Tagger(), tmp_path / "m", task="tensors", example=example, precisions=["fp32"], shapes=shapes
    )
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert latest(tmp_path / "m", "onnx-fp32").metrics["worst_cosine"] > 0.999


def test_offsets_stay_in_order(tmp_path):
    """The classifier of PyTorch's tutorial: texts in one row, and where each begins."""

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = torch.nn.EmbeddingBag(100, 8), torch.nn.Linear(8, 3)

        def forward(self, text, offsets):
            return self.out(self.embedding(text, offsets))

    torch.manual_seed(0)
    module = Classifier()
    example = {"text": np.random.default_rng(0).integers(0, 100, 30), "offsets": np.array([0, 10, 20])}
    shapes = {"text.0": "tokens", "tokens": (8, 30, 200)}
    mlflow_tdeploy.save_model(
        module, tmp_path / "m", task="tensors", example=example, precisions=["fp32"], shapes=shapes
    )
    assert Bundle.open(tmp_path / "m").manifest.task_config["ordered"] == {"offsets": 0}
    asked = {"text": np.arange(50) % 100, "offsets": np.array([0, 1, 7, 40])}
    with torch.inference_mode():
        expected = module.eval()(*map(torch.from_numpy, asked.values())).numpy()
    with mlflow_tdeploy.load_model(str(tmp_path / "m")) as model:
        (answer,) = model.predict(asked).values()
        np.testing.assert_allclose(answer, expected, atol=1e-5)


def latest(model, variant):
    return latest_accuracy(Bundle.open(model).evidence(variant))


class Recommender(torch.nn.Module):
    """The best five of a row's candidates, of which rows may have fewer."""

    def __init__(self):
        super().__init__()
        self.users, self.items = torch.nn.Embedding(500, 16), torch.nn.Embedding(300, 16)

    def forward(self, user, candidates, mask):
        scores = (self.users(user)[:, None] * self.items(candidates)).sum(-1).masked_fill(~mask, float("-inf"))
        best, places = scores.topk(5)
        return {"scores": best, "item": candidates.gather(1, places)}


def test_a_choice_behind_a_masked_score_is_none(tmp_path):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    example = {
        "user": random.integers(0, 500, 8),
        "candidates": random.integers(0, 300, (8, 12)),
        "mask": np.arange(12)[None] < np.array([12, 3, 7, 5, 12, 9, 2, 4])[:, None],
    }
    mlflow_tdeploy.save_model(Recommender(), tmp_path / "m", task="tensors", example=example, precisions=["fp32"])
    assert latest(tmp_path / "m", "onnx-fp32").metrics["exact_share"] == 1.0


def test_choices_that_say_something_count_though_others_are_masked():
    specs = (TensorSpec("scores", "float32", ("batch", 3)), TensorSpec("item", "int64", ("batch", 3)))
    signature = Signature((Dim("batch", 1, 4, 8),), (TensorSpec("x", "float32", ("batch",)),), specs)
    scores = np.tile(np.array([[2.0, 1.0, -np.inf]], np.float32), (8, 1))
    item = np.tile(np.array([[5, 4, 0]]), (8, 1))
    item[:, 2] = np.arange(8)  # any, so none of them says that there is none
    for place, share in ((2, 1.0), (1, 0.5)):
        other = item.copy()
        other[:, place] += 1
        comparison = TASKS.get("tensors")({}, signature, Path()).comparison()
        comparison.add({"scores": scores, "item": item}, {"scores": scores, "item": other}, {"x": np.ones(8)})
        assert comparison.metrics()["exact_share"] == share


def test_packed_sequences_without_a_state_say_what_to_write(tmp_path):
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn = torch.nn.Embedding(100, 16), torch.nn.LSTM(16, 16, batch_first=True)

        def forward(self, ids, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(
                self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
            )
            return self.rnn(packed)[1][0][-1]

    example = {"ids": np.ones((6, 12), np.int64) * np.arange(1, 13), "lengths": np.array([12, 5, 3, 9, 12, 1])}
    with pytest.raises(MlflowException, match=r"Packed could not be exported .* with an initial state that is passed"):
        mlflow_tdeploy.save_model(Packed(), tmp_path / "m", task="tensors", example=example, precisions=["fp32"])
    assert not (tmp_path / "m").exists()


def test_an_operator_that_torch_does_not_export_is_named_once(tmp_path):
    class Binned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("edges", torch.linspace(-2, 2, 9))

        def forward(self, x):
            return torch.searchsorted(self.edges, x).float()

    with pytest.raises(
        MlflowException, match=r"Binned could not be exported .* no ONNX for aten::searchsorted"
    ) as error:
        mlflow_tdeploy.save_model(Binned(), tmp_path / "m", example={"x": np.zeros((4, 3), np.float32)})
    assert str(error.value).count("searchsorted") == str(error.value).count("could not be exported") == 1
    assert "range" not in str(error.value)


def test_a_cache_that_is_returned_says_how_to_leave_it_out(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    example = {"input_ids": np.arange(8).reshape(2, 4)}
    with pytest.raises(MlflowException, match="config.use_cache = False"):
        mlflow_tdeploy.save_model(model, tmp_path / "m", task="tensors", example=example, precisions=["fp32"])
    model.config.use_cache = False
    mlflow_tdeploy.save_model(model, tmp_path / "m", task="tensors", example=example, precisions=["fp32"])


class Ties(torch.nn.Module):
    """The best five by a score that many have, such as 0."""

    def __init__(self, broken):
        super().__init__()
        self.linear, self.broken = torch.nn.Linear(4, 40), broken

    def forward(self, x):
        scores = torch.relu(self.linear(x) - 1)
        return torch.topk(scores - 1e-6 * torch.arange(40) if self.broken else scores, 5)


def test_ties_are_told_and_a_model_that_breaks_them_is_logged(tmp_path):
    example = {"x": RANDOM.standard_normal((32, 4)).astype(np.float32)}
    with pytest.raises(MlflowException, match=r"equal scores.*break such ties.*scores - 1e-6 \* position"):
        mlflow_tdeploy.save_model(Ties(False), tmp_path / "ties", example=example, precisions=["fp32"])
    mlflow_tdeploy.save_model(Ties(True), tmp_path / "m", example=example, precisions=["fp32"])


class Gaps(torch.nn.Module):
    """A series whose times must rise; its answer has no finite value otherwise."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = torch.nn.GRU(2, 8, batch_first=True), torch.nn.Linear(8, 1)

    def forward(self, x, ts):
        gap = torch.log((ts[:, 1:] - ts[:, :-1]).float())
        steps, _ = self.rnn(torch.stack([x[:, 1:], gap], -1))
        return self.head(steps[:, -1])


GAPS = {
    "x": RANDOM.standard_normal((8, 24)).astype(np.float32),
    "ts": 1_700_000_000 + RANDOM.integers(1, 900, (8, 24)).cumsum(axis=1),
}
ANY_TIME = {"x.1": "time", "ts.1": "time", "time": (2, 24, 64)}


def test_a_series_is_checked_at_every_length_its_times_rising(tmp_path):
    mlflow_tdeploy.save_model(Gaps(), tmp_path / "m", example=GAPS, shapes=ANY_TIME, precisions=["fp32"])
    accuracy = latest_accuracy(Bundle.open(tmp_path / "m" / "tdeploy").evidence("onnx-fp32"))
    assert "reference_non_finite" not in accuracy.metrics
    assert {"batch=64,time=64", "batch=1,time=2"} <= set(accuracy.shapes)


class Short(torch.nn.Module):
    """Knows no answer for more than 24 steps."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 3)

    def forward(self, x):
        steps = torch.ones_like(x).sum(1, keepdim=True)
        return self.linear(x.mean(1, keepdim=True)) + torch.log(24.5 - steps)


def test_sizes_without_a_finite_answer_are_told_and_count_for_none(tmp_path, caplog):
    example = {"x": RANDOM.standard_normal((8, 24)).astype(np.float32)}
    shapes = {"x.1": "time", "time": (2, 24, 64)}
    mlflow_tdeploy.save_model(Short(), tmp_path / "m", example=example, shapes=shapes, precisions=["fp32"])
    accuracy = latest_accuracy(Bundle.open(tmp_path / "m" / "tdeploy").evidence("onnx-fp32"))
    assert "batch=8,time=24" in accuracy.shapes
    assert "batch=64,time=64" not in accuracy.shapes
    assert "no finite answer to made-up values at" in caplog.text
    assert "batch=64,time=64" in caplog.text
