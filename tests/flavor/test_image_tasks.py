"""Models of images from Hugging Face to what MLflow loads, scores and serves."""

from __future__ import annotations

import base64
import io
import json

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.models import ModelSignature
from mlflow.pyfunc import scoring_server
from mlflow.types import ColSpec, Schema

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.store.bundle import Bundle
from tests.core.tasks.image_models import LABELS, model_of, processor_of, written
from tests.pictures import opened, pictures
from tests.served import close_to


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of images that was saved from its folder; yields that and the model's."""
    folder = tmp_path_factory.mktemp("images")
    source = written("vit", folder / "source")
    files = pictures(80)
    table = pd.DataFrame({"image": files, "label": [LABELS[index % 3] for index in range(len(files))]})
    mlflow_tdeploy.save_model(source, folder / "model", precisions=["fp32", "int8"], verify_with=table)
    return source, folder / "model"


@pytest.fixture(scope="module")
def served(classifier):
    return TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(classifier[1]))))


def test_answers_come_as_from_the_pipeline(classifier):
    from transformers import pipeline

    original = pipeline("image-classification", model=str(classifier[0]), device="cpu")
    loaded = mlflow.pyfunc.load_model(str(classifier[1]))
    files = pictures(24)
    wanted = original([opened(file) for file in files], top_k=2)
    table = pd.DataFrame({"image": files})
    assert loaded.predict(table, params={"top_k": 2, "variant": "onnx-fp32"}) == close_to(wanted)
    assert loaded.predict(table, params={"top_k": 2, "variant": "hf"}) == close_to(wanted)


def test_each_variant_was_checked_on_the_pictures_with_their_labels(classifier):
    bundle = Bundle.open(classifier[1])
    assert {"hf", "onnx-fp32", "ort-cpu-fp32", "ort-cpu-int8"} <= set(bundle.variants)
    found = latest_accuracy(bundle.evidence("ort-cpu-fp32"))
    assert found.passed
    assert found.data.count == 80
    assert {"accuracy", "loss", "accuracy_drop", "label_agreement", "worst_cosine"} <= set(found.metrics)
    assert found.metrics["label_agreement"] > 0.999


def test_its_environment_has_pillow_and_no_transformers(classifier):
    lines = (classifier[1] / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("pillow==") for line in lines)
    assert not any(line.startswith(("torch", "transformers")) for line in lines)


def test_golden_requests_hold_the_files_and_are_answered_alike(classifier):
    bundle = Bundle.open(classifier[1])
    golden = bundle.golden()
    assert [len(one.inputs) for one in golden] == [1, 2]
    assert all(isinstance(image, bytes) for one in golden for image in one.inputs)
    task = bundle.task()
    for one in golden:
        np.testing.assert_array_equal(
            task.encode(task.items(one.inputs)).whole()["pixel_values"], one.feeds["pixel_values"]
        )


@pytest.mark.parametrize(
    "body",
    [
        lambda coded: {"inputs": coded},
        lambda coded: {"instances": coded},
        lambda coded: {"dataframe_split": {"columns": ["image"], "data": [[one] for one in coded]}},
        lambda coded: {"dataframe_records": [{"image": one} for one in coded]},
        lambda coded: {"dataframe_records": [{"image": one, "id": 7} for one in coded]},
        lambda coded: {"inputs": {"image": coded}},
        lambda coded: {"inputs": [f"data:image/png;base64,{one}" for one in coded]},
    ],
)
def test_mlflows_server_takes_pictures_in_base64(served, classifier, body):
    files = pictures(3)
    coded = [base64.b64encode(file).decode() for file in files]
    answer = served.post("/invocations", json=body(coded))
    assert answer.status_code == 200, answer.text
    expected = mlflow_tdeploy.load_model(str(classifier[1])).predict(files)
    assert answer.json()["predictions"] == close_to(expected)


def test_mlflows_server_takes_pixels(served, classifier):
    pixels = [np.asarray(opened(file).convert("RGB").resize((8, 6))).tolist() for file in pictures(2)]
    answer = served.post("/invocations", json={"inputs": pixels})
    assert answer.status_code == 200, answer.text
    expected = mlflow_tdeploy.load_model(str(classifier[1])).predict([np.array(one) for one in pixels])
    assert answer.json()["predictions"] == close_to(expected)


def test_mlflows_server_tells_what_is_no_picture(served):
    answer = served.post("/invocations", json={"inputs": ["/etc/passwd"]})
    assert answer.status_code == 400
    assert "Paths and addresses are not opened" in answer.json()["message"]
    good = base64.b64encode(pictures(1)[0]).decode()
    answer = served.post("/invocations", json={"inputs": [good, "x"], "params": {"errors": "null"}})
    first, second = json.loads(answer.text)["predictions"]
    assert len(first) == 5
    assert second is None


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_a_signature_of_the_users_own_is_kept(kind, classifier, tmp_path):
    signature = ModelSignature(inputs=Schema([ColSpec(kind, "image")]))
    mlflow_tdeploy.save_model(written("vit", tmp_path / "s"), tmp_path / "m", precisions=["fp32"], signature=signature)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    files = pictures(2)
    given = files if kind == "binary" else [base64.b64encode(file).decode() for file in files]
    expected = mlflow_tdeploy.load_model(str(tmp_path / "m")).predict(files)
    assert loaded.predict(pd.DataFrame({"image": given})) == expected


def test_without_data_it_is_checked_on_made_up_pictures_and_says_so(tmp_path):
    mlflow_tdeploy.save_model(
        model_of("convnext", head=False), tmp_path / "m", image_processor=processor_of("convnext"), precisions=["fp32"]
    )
    bundle = Bundle.open(tmp_path / "m")
    found = latest_accuracy(bundle.evidence("onnx-fp32"))
    assert found.data.name == "made-up pictures"
    assert found.data.count == 64
    assert bundle.manifest.task == "image-feature-extraction"
    (states,) = mlflow_tdeploy.load_model(str(tmp_path / "m")).predict(pictures(1))
    assert states.shape == (1, 32, 8, 8)


@pytest.mark.parametrize(
    "data",
    [
        lambda images, arrays: images,
        lambda images, arrays: arrays,
        lambda images, arrays: [{"image": one} for one in arrays],
        lambda images, arrays: [{"image": one, "label": "sky"} for one in images],
        lambda images, arrays: {"image": np.stack([one[:8, :8] for one in arrays]), "label": ["sky"] * len(arrays)},
    ],
)
def test_pictures_to_check_with_come_in_any_form(data, classifier):
    from mlflow_tdeploy.build.verify_data import VerifyData

    task = Bundle.open(classifier[1]).task()
    images = [opened(file) for file in pictures(70)]
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    found = VerifyData.of(data(images, arrays)).for_task(task)
    assert len(found.texts) == 70
    assert all(isinstance(one, np.ndarray) for one in found.texts)
    assert found.labels is None or set(found.labels) == {"sky"}
    other = VerifyData.of(data(images[::-1], arrays[::-1])).for_task(task)
    assert found.sha256 != other.sha256
    assert found.sha256 == VerifyData.of(data(images, arrays)).for_task(task).sha256


def test_each_size_of_batch_is_asked_once(classifier, tmp_path):
    from mlflow_tdeploy.build.reference import ReferenceAnswers
    from mlflow_tdeploy.build.verify_data import VerifyData

    task = Bundle.open(classifier[1]).task()
    sizes = []

    def reference(feeds):
        sizes.append(len(feeds["pixel_values"]))
        return {"logits": feeds["pixel_values"].reshape(sizes[-1], -1)[:, : len(LABELS)]}

    found = ReferenceAnswers(task, VerifyData.of(None).for_task(task), reference, tmp_path)
    assert [case.shape for case in found.cases if case.part == "corners"] == ["batch=1", "batch=8", "batch=64"]
    assert sizes[:3] == [1, 8, 64]


def test_few_pictures_are_joined_by_made_up_ones(classifier):
    from mlflow_tdeploy.build.verify_data import VerifyData

    task = Bundle.open(classifier[1]).task()
    found = VerifyData.of({"image": pictures(10), "label": [0] * 10}).for_task(task)
    assert len(found.texts) == 64
    assert len(found.labels) == 10
    assert found.name == "given and 54 made-up pictures without labels"
    with pytest.raises(InvalidInputError, match="takes such, got arrays|which column holds the images"):
        VerifyData.of([{"a": np.zeros(3), "b": np.zeros(3)}]).for_task(task)
    with pytest.raises(InvalidInputError, match="Of the data: Image 1 is no image"):
        VerifyData.of([pictures(1)[0], b"x"]).for_task(task)


def test_ranges_are_found_on_pictures_that_are_given(tmp_path):
    buffer = io.BytesIO()
    opened(pictures(1)[0]).save(buffer, "PNG")
    mlflow_tdeploy.save_model(
        written("vit", tmp_path / "s"),
        tmp_path / "m",
        precisions=["fp32", "onnx-int8"],
        calibrate_with=[*pictures(40), buffer.getvalue()],
    )
    variant = Bundle.open(tmp_path / "m").variants["onnx-int8"]
    assert variant.precision.settings["calibration"]["items"] == 41


def test_a_graph_whose_input_is_called_images_is_verified_and_calibrated_on_arrays(tmp_path):
    from mlflow_tdeploy.build.calibration import CalibrationData
    from mlflow_tdeploy.build.verify_data import VerifyData

    rows = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]

    class Dataset(list):
        column_names = ("images",)

    given = Dataset({"images": row} for row in rows)
    assert len(CalibrationData.of(given).data.requests) == 2
    assert len(VerifyData.of({"images": rows}).requests) == 1
    assert VerifyData.of({"text": ["a", "b"], "image": [1.5, 2.5], "label": [0, 1]}).texts == ("a", "b")
    files = pictures(3)

    class Pictures(dict):
        column_names = ("image", "label")

        def __getitem__(self, key):
            return {"image": {"bytes": files[key]}, "label": 1} if isinstance(key, int) else super().__getitem__(key)

    found = CalibrationData.of(Pictures(image=[{"bytes": one} for one in files], label=[1, 1, 1])).data
    assert len(found.texts) == 3


def test_an_export_that_computes_something_else_is_not_said_to_want_a_wider_budget(tmp_path, monkeypatch, caplog):
    from mlflow_tdeploy.build import export

    whole = export.export_module

    def wrong(module, feeds, signature, path, **more):
        """An exporter that loses a factor."""
        import onnx

        found = whole(module, feeds, signature, path, **more)
        model = onnx.load(path)
        (node,) = [one for one in model.graph.node if "logits" in one.output]
        node.output[0] = "right"
        model.graph.node.append(onnx.helper.make_node("Neg", ["right"], ["logits"]))
        onnx.save(model, path)
        return found

    monkeypatch.setattr("mlflow_tdeploy.build.recipes.onnx_fp32.export_module", wrong)
    mlflow_tdeploy.save_model(written("convnext", tmp_path / "s"), tmp_path / "m", precisions=["onnx-fp32"])
    assert [name for name, one in Bundle.open(tmp_path / "m").variants.items() if not one.dropped] == ["hf"]
    assert "would only hide that" in caplog.text
