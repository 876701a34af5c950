"""int8 by fake quantization in torch: layers by rules, attention and residuals, training, explicit Q/DQ."""

from __future__ import annotations

import builtins
import copy
import importlib.util

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mlflow_tdeploy import FakeQuant, Layers, Quantizer
from mlflow_tdeploy.build.calibration import CalibrationData
from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.build.engine_variant import build_engine_variant
from mlflow_tdeploy.build.extend import build_variant
from mlflow_tdeploy.build.fake_quant.layers import quantizer
from mlflow_tdeploy.build.fake_quant.model import Rounding
from mlflow_tdeploy.build.options import BuildOptions, precisions_of
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError, BuildError, InvalidInputError, MissingDependencyError
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle
from tests.build.building import accuracy, build
from tests.build.test_int8_mixed import WIDTH, Planted
from tests.build.test_onnx_int8 import Delicate, operators, requests

if importlib.util.find_spec("pytorch_quantization") is None:  # importing it has absl take over the root logger
    pytest.skip("no pytorch-quantization", allow_module_level=True)
STATIC, FP32, LOOP = "int8, static", "fp32", "int8 weights and inputs, computed in fp32"
TEXTS = [f"{a} {b} is {c}" for a in ("the", "a") for b in ("cat", "dog", "old house") for c in ("here", "very good")]
WIDE = Budget.of("worst_cosine >= 0.9")


def fake_quantized(module, folder, given, fake=None, *, shapes=None, budget=None, **more):
    precisions, recipe_options = precisions_of([fake or FakeQuant()])
    options = BuildOptions(
        measure=False,
        precisions=precisions,
        recipe_options=recipe_options,
        data=VerifyData.of(given),
        budget=budget,
        **more,
    )
    source = resolve(module, example=given[0], shapes=shapes or {"batch": (1, 8, 16)})
    _, bundle = build(source, folder, options)
    return bundle, bundle.variants["onnx-int8-torch"]


def forms(made):
    return made.precision.settings["products"]


def arrays(*shape, count=6, name="x"):
    random = np.random.default_rng(0)
    return [{name: random.normal(size=shape).astype(np.float32)} for _ in range(count)]


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
        self.up, self.mean = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.AvgPool2d(2)
        self.all, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.all(self.mean(self.up(self.pool(self.conv(x).relu())).relu())).flatten(1))


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv1d(3, 8, 3, padding=1), nn.AvgPool1d(2)
        self.up, self.all, self.head = nn.ConvTranspose1d(8, 8, 2, stride=2), nn.AdaptiveAvgPool1d(1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.all(self.up(self.pool(self.conv(x).relu())).relu()).flatten(1))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv3d(2, 8, 3, padding=1), nn.MaxPool3d(2)
        self.up, self.all, self.head = nn.ConvTranspose3d(8, 8, 2, stride=2), nn.AdaptiveAvgPool3d(1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.all(self.up(self.pool(self.conv(x).relu())).relu()).flatten(1))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.loop = nn.LSTM(6, 8, batch_first=True, bidirectional=True, num_layers=2)
        self.cell, self.head = nn.LSTMCell(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.cell(self.loop(x)[0][:, -1])[0])


@pytest.mark.parametrize(
    ("made", "given", "wanted"),
    [
        (Pictures, arrays(8, 3, 8, 8), dict.fromkeys(("conv", "pool", "up", "mean", "all", "head"), STATIC)),
        (Sound, arrays(8, 3, 16), dict.fromkeys(("conv", "pool", "up", "all", "head"), STATIC)),
        (Volumes, arrays(8, 2, 4, 4, 4), dict.fromkeys(("conv", "pool", "up", "all", "head"), STATIC)),
        (Steps, arrays(8, 5, 6), {"loop": LOOP, "cell": LOOP, "head": STATIC}),
    ],
)
def test_every_kind_of_layer_is_in_eight_bits_as_is_read_back(tmp_path, made, given, wanted):
    torch.manual_seed(0)
    bundle, variant = fake_quantized(made(), tmp_path / "model", given, budget=WIDE)
    assert forms(variant) == wanted
    assert "not_as_asked" not in variant.precision.settings
    assert accuracy(bundle, variant.id).passed
    graph = onnx.load(bundle.path(variant.entry)).graph
    eight = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    large = [one for one in graph.initializer if len(one.dims) >= 2 and np.prod(one.dims) > 8]
    assert large
    assert all(one.data_type in eight for one in large), "weights are stored as integers"


class Block(nn.Module):
    """One block of a transformer, its norm after each residual."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2)) / WIDTH**0.5
        x = self.first_norm(self.out(scores.softmax(-1) @ self.value(x)) + x)
        return self.second_norm(self.down(torch.relu(self.up(x))) + x)


def test_products_and_residuals_between_activations_are_quantized_where_asked(tmp_path):
    given = arrays(4, 6, WIDTH)
    _, plain = fake_quantized(Block(), tmp_path / "plain", given, budget=WIDE)
    assert set(forms(plain)) == {"query", "key", "value", "out", "up", "down"}
    module = Block()
    both = FakeQuant(attention=True, residuals=True)
    bundle, made = fake_quantized(module, tmp_path / "both", given, both, budget=WIDE)
    assert {name: form for name, form in forms(made).items() if "_" in name} == dict.fromkeys(
        ("matmul_0", "matmul_1", "add_0", "add_1"), STATIC
    )
    model = onnx.load(bundle.path(made.entry))
    rounded = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    taken = {node.name: [name in rounded for name in node.input] for node in model.graph.node}
    assert taken["matmul_0"] == taken["matmul_1"] == [True, True]
    assert sorted(taken["add_0"]) == sorted(taken["add_1"]) == [False, True], "what goes around, not what was made"
    assert type(module).forward is Block.forward, "the user's model is as it was"
    assert not [name for name, _ in module.named_modules() if "quantizer" in name]


def test_rules_choose_layers_by_class_name_and_pattern_and_the_last_counts(tmp_path):
    rules = [
        Layers("Linear", input=Quantizer(calibrator="max")),
        Layers(r"key|value", input=None),
        Layers("value", weight=None, input=None),
        Layers("up", weight=Quantizer(axis=None, calibrator="mse")),
        Layers("down", weight=None),
        Layers("matmul_1"),
    ]
    bundle, made = fake_quantized(
        Block(), tmp_path / "model", arrays(4, 6, WIDTH), FakeQuant(layers=rules), budget=WIDE
    )
    assert forms(made) == {
        "query": STATIC, "key": "int8 weights", "value": FP32, "out": STATIC, "up": STATIC, "down": "int8 input",
        "matmul_1": STATIC,
    }  # fmt: skip
    graph = onnx.load(bundle.path(made.entry)).graph
    sizes = {one.name: one.dims for one in graph.initializer}
    scales = {node.output[0]: sizes[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"}
    of_weights = {node.name: list(scales[node.input[1]]) for node in graph.node if node.name in ("query", "up")}
    assert of_weights == {"query": [WIDTH], "up": []}, "a range for each channel, and one for all"
    assert made.precision.settings["layers"][1] == {"match": "key|value", "input": None, "weight": {
        "bits": 8, "axis": "output", "calibrator": None}}  # fmt: skip
    only = FakeQuant(layers=[Layers("out")], only=True)
    _, one = fake_quantized(Block(), tmp_path / "one", arrays(4, 6, WIDTH), only, budget=WIDE)
    assert forms(one) == {"out": STATIC}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantizer(bits=4), "bits must be 8, got 4"),
        (lambda: Quantizer(axis=-1), "axis must be"),
        (lambda: Quantizer(calibrator="best"), "Unknown calibrator 'best'. Known: max"),
        (lambda: Layers("("), "is no regular expression"),
        (lambda: Layers("Linear", input=Quantizer(axis=0)), "have one range"),
        (lambda: FakeQuant(layers=["Linear"]), "layers is a list like"),
        (lambda: FakeQuant(layers=Layers("Linear")), "layers is a list like"),
        (lambda: Layers("Linear", input="percentile"), "input of 'Linear' is a Quantizer"),
        (lambda: Layers("Linear", weight=8), "weight of 'Linear' is a Quantizer"),
        (lambda: precisions_of(FakeQuant()), "precisions is a list"),
        (lambda: precisions_of([FakeQuant]), "make one of it"),
        (lambda: quantizer(Quantizer(axis=1)), "axis='output', here 0"),
        (lambda: FakeQuant(train=7), "train is a function"),
        (lambda: precisions_of([FakeQuant(), "onnx-int8-torch"]), "twice"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(make, said):
    with pytest.raises(InvalidInputError, match=said):
        make()


def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
    rules = FakeQuant(layers=[Layers("encoder.*")])
    with pytest.raises(InvalidInputError, match=r"No layer matches 'encoder\.\*'.*Linear.*query"):
        fake_quantized(Block(), tmp_path / "model", arrays(4, 6, WIDTH), rules)
    assert not (tmp_path / "model").exists()


def test_the_delicate_layer_stays_fp32_and_no_other(tmp_path):
    bundle, made = fake_quantized(Delicate(), tmp_path / "model", requests())
    assert accuracy(bundle, made.id).passed
    assert len(made.precision.kept) == 1
    assert list(forms(made).values()).count(FP32) == 1
    assert forms(made)[made.precision.kept[0]] == FP32
    assert operators(bundle, made)["QuantizeLinear"] == len(forms(made)) - 1


def distilled(teacher, given, steps=100, rate=1e-3):
    """Return what trains a model to answer as another one does."""
    x = torch.from_numpy(np.concatenate([one["x"] for one in given]))
    with torch.no_grad():
        wanted = teacher(x)

    def train(model):
        assert model.training
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), wanted).backward()
            optimizer.step()

    return train


def test_training_under_quantization_brings_it_closer_and_leaves_the_model_alone(tmp_path):
    module, given = Planted(), requests(count=12, rows=16)
    before = copy.deepcopy(module.state_dict())
    fake = FakeQuant(train=distilled(module, given))
    state = torch.random.get_rng_state()
    bundle, made = fake_quantized(module, tmp_path / "trained", given, fake, budget=WIDE)
    assert torch.equal(state, torch.random.get_rng_state())
    plain, _ = fake_quantized(module, tmp_path / "plain", given, budget=WIDE)
    off = [1 - accuracy(one, "onnx-int8-torch").metrics["worst_cosine"] for one in (bundle, plain)]
    assert off[0] < 0.4 * off[1], "0.0033 instead of 0.025 when this was written"
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    assert "distilled" in made.precision.settings["trained_by"]
    _, again = fake_quantized(module, tmp_path / "again", given, fake, budget=WIDE)
    assert again.digest == made.digest


def test_training_that_diverges_is_an_error_and_leaves_nothing(tmp_path):
    def diverge(model):
        with torch.no_grad():
            next(model.parameters()).mul_(float("inf"))

    with pytest.raises(BuildError, match="Fine-tuning diverged"):
        fake_quantized(Planted(()), tmp_path / "model", requests(), FakeQuant(train=diverge))
    assert not (tmp_path / "model").exists()


def test_training_that_moves_answers_over_the_budget_is_told_from_quantization(tmp_path):
    def away(model):
        with torch.no_grad():
            list(model.parameters())[-1].add_(100.0)

    options = {"measure": False, "budget": Budget.of("worst_cosine >= 0.99"), "on_budget": "raise"}
    precisions, recipe_options = precisions_of([FakeQuant(train=away)])
    given = requests()
    made = resolve(Planted(()), example=given[0], shapes={"batch": (1, 8, 16)})
    settings = BuildOptions(precisions=precisions, recipe_options=recipe_options, data=VerifyData.of(given), **options)
    with pytest.raises(BudgetError, match="training itself has moved its answers") as caught:
        build(made, tmp_path / "model", settings)
    assert len([one for one in caught.value.trials if "passed" in one]) == 2, "no more was tried"


def test_data_without_a_range_is_said(tmp_path):
    large = [{"x": np.full_like(one["x"], 3e38)} for one in requests(count=20)]
    with pytest.raises(BuildError, match="'layers.1' takes on the calibration data is not finite"):
        fake_quantized(Planted(()), tmp_path / "inf", requests(), calibrate=CalibrationData.of(large))
    zeros = [{"input": np.zeros_like(one["x"])} for one in requests(count=20)]
    given = [{"input": one["x"]} for one in requests()]
    alone = nn.Sequential(nn.Linear(WIDTH, 4))
    with pytest.raises(BuildError, match="all inputs of layers are 0"):
        fake_quantized(alone, tmp_path / "zeros", given, calibrate=CalibrationData.of(zeros))


def test_layers_without_a_range_are_known_whichever_calibrator_is_asked_last():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.dark = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

        def forward(self, x):
            return self.seen(x) + self.dark(x * 0)

    made = resolve(Half().eval(), example=requests()[0])
    rounding = Rounding(made.module_for("eager"), FakeQuant(), made.signature, requests())
    for calibrator in ("max", "percentile", "mse"):
        rounding.calibrate(calibrator)
        assert rounding.blind == ("dark",)


def test_tensorrt_builds_an_engine_from_it(tmp_path):
    """TensorRT-RTX, whose builder needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    fake = FakeQuant(attention=True, residuals=True)
    bundle, _ = fake_quantized(Block(), tmp_path / "model", arrays(4, 6, WIDTH), fake, budget=WIDE)
    options = EngineOptions("int8-torch", module="tensorrt_rtx")
    engine = build_engine_variant(bundle, options, tmp_path, BuildOptions(measure=False))
    assert (engine.variant.parent, engine.variant.precision.name) == ("onnx-int8-torch", "int8")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pytorch_quantization"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlflow-tdeploy\[pytorch-quantization\]'"):
        fake_quantized(Planted(()), tmp_path / "model", requests())


def test_a_bundle_without_its_original_says_so(tmp_path):
    options = BuildOptions(measure=False, precisions=("fp32",), data=VerifyData.of(requests()))
    source = resolve(Planted(()), example=requests()[0], shapes={"batch": (1, 8, 16)})
    _, bundle = build(source, tmp_path / "model", options)
    with pytest.raises(BuildError, match="which this model does not hold"):
        build_variant(bundle, "onnx-int8-torch", tmp_path, BuildOptions(measure=False))


def test_a_model_that_is_logged_gets_it_from_the_original_it_keeps(tiny_bundle, tmp_path):
    bundle = Bundle.open(tiny_bundle)
    fake = FakeQuant(layers=[Layers(r"bert\.encoder\.layer\.0\..*", weight=None, input=None)], attention=True)
    _, recipe_options = precisions_of([fake])
    options = BuildOptions(measure=False, data=VerifyData.of(TEXTS), recipe_options=recipe_options, budget=None)
    made = build_variant(bundle, fake.recipe, tmp_path, options).variant
    assert not made.dropped
    whole = {name for name, form in forms(made).items() if form == STATIC}
    assert {"classifier", "bert.encoder.layer.1.attention.self.query"} <= whole, "as named_modules() says"
    assert {"bert.encoder.layer.1.attention.self.matmul_0", "bert.encoder.layer.1.attention.self.matmul_1"} <= whole
    assert not any(".layer.0." in name for name in whole)


@pytest.mark.slow
def test_a_trainer_trains_a_copy(tiny_bert, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    before = copy.deepcopy(model.state_dict())
    encoded = tokenizer(TEXTS, padding=True)
    rows = [{**{key: torch.tensor(of[i]) for key, of in encoded.items()}, "labels": i % 2, "more": text}
            for i, text in enumerate(TEXTS)]  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=3, learning_rate=1e-4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    fake = FakeQuant(attention=True, residuals=True, train=trainer)
    precisions, recipe_options = precisions_of([fake])
    options = BuildOptions(
        measure=False, precisions=precisions, recipe_options=recipe_options, data=VerifyData.of(TEXTS),
        budget=Budget.of("max_score_difference <= 0.5"),
    )  # fmt: skip
    _, bundle = build(resolve(model, tokenizer=tokenizer), tmp_path / "model", options)
    assert "trained" in bundle.variants[fake.recipe].precision.settings["searched"]
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert trainer.model is model
    trainer.create_optimizer()
    with pytest.raises(InvalidInputError, match="has an optimizer for the model itself"):
        build(resolve(model, tokenizer=tokenizer), tmp_path / "again", options)
