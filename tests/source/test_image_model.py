from __future__ import annotations

import json

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import ExportError, InvalidInputError, NotFoundError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source._image_processor import check_image_parity, open_processor, processor_settings
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.image_models import LABELS, model_of, processor_of, written
from tests.pictures import odd, opened, pictures
from tests.served import close_to, pipeline_of

#: Processors of transformers that classifiers and backbones of images have.
KINDS = (
    *("Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT"),
    *("PoolFormer", "Pvt", "Segformer", "Siglip", "ViT"),
)


def _task(config, task="image-feature-extraction"):
    height, width = config.get("crop") or config["size"]
    signature = Signature(
        (Dim("batch", 1, 8, 64),),
        (TensorSpec("pixel_values", "float32", ("batch", 3, height, width)),),
        (TensorSpec("last_hidden_state", "float32", ("batch", 4)),),
    )
    return TASKS.get(task)(config, signature, None), signature


def _processor(kind, **more):
    import transformers

    return getattr(transformers, f"{kind}ImageProcessorPil")(**more)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_made_ready_as_by_the_processor(kind):
    from transformers.image_utils import load_image

    processor = _processor(kind)
    task, signature = _task(processor_settings(processor))
    check_image_parity(task.name, processor_settings(processor), signature, processor)
    files = [*pictures(33), *odd()]
    got = task.encode(task.items(files)).whole()["pixel_values"]
    for file, mine in zip(files, got, strict=True):
        wanted = processor(images=load_image(opened(file)), return_tensors="np")
        np.testing.assert_array_equal(mine, np.asarray(wanted["pixel_values"][0], np.float32))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("ConvNext", {"size": {"shortest_edge": 100}, "crop_pct": 0.5}),
        ("EfficientNet", {"rescale_offset": True, "do_center_crop": True, "size": {"height": 300, "width": 280}}),
        ("EfficientNet", {"include_top": False}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"do_rescale": False, "do_normalize": False}),
        ("ViT", {"do_rescale": False}),
        ("ViT", {"resample": 0, "size": {"height": 30, "width": 50}}),
        ("ViT", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "rescale_factor": 0.01}),
        ("CLIP", {"size": {"shortest_edge": 60}, "crop_size": {"height": 80, "width": 100}}),  # black around
        ("CLIP", {"crop_size": {"height": 10, "width": 225}}),
        ("MobileViT", {"do_flip_channel_order": False}),
        ("PoolFormer", {"size": {"height": 90, "width": 90}, "crop_size": {"height": 90, "width": 90}}),
    ],
)
def test_settings_of_processors_count(kind, more):
    processor = _processor(kind, **more)
    config = processor_settings(processor)
    task, signature = _task(config)
    check_image_parity(task.name, config, signature, processor)
    if kind == "CLIP":
        with pytest.raises(ExportError, match="cannot be reproduced: of an image of"):
            check_image_parity(task.name, {**config, "resample": 0}, signature, processor)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("Siglip2", {}, "Images must come to one size"),
        ("CLIP", {"do_center_crop": False}, "Images must come to one size"),
        ("ViT", {"image_mean": [0.5], "image_std": [0.5]}, "mean must have 3 numbers"),
    ],
)
def test_a_processor_that_cannot_be_reproduced_is_refused(kind, more, why):
    with pytest.raises(InvalidInputError, match=f"{kind}ImageProcessorPil cannot be reproduced: .*{why}"):
        processor_settings(_processor(kind, **more))


def test_a_processor_of_torchvision_is_replaced_by_that_of_pillow():
    class ViTImageProcessorFast:
        """What transformers has where torchvision is installed."""

        backend = "torchvision"
        image_mean = (0.5, 0.5, 0.5)

        def __call__(self):
            raise AssertionError("not asked")

        def to_dict(self):
            return processor_of("vit").to_dict()

    found = open_processor(ViTImageProcessorFast())
    assert type(found).__name__ == "ViTImageProcessorPil"
    assert processor_settings(found) == processor_settings(processor_of("vit"))


def test_a_model_of_images_is_told_by_its_class_and_folder(tmp_path):
    folder = written("vit", tmp_path / "classifier")
    source = resolve(folder)
    assert source.task == "image-classification"
    assert source.record.architecture == "ViTForImageClassification"
    assert [str(spec.name) for spec in source.signature.inputs] == ["pixel_values"]
    assert source.signature.inputs[0].shape == ("batch", 3, 64, 64)
    assert resolve(written("resnet", tmp_path / "body", head=False)).task == "image-feature-extraction"
    assert resolve(model_of("vit"), image_processor=folder).task_config == source.task_config


def test_what_a_source_writes_answers_as_before(tmp_path):
    from mlflow_tdeploy.runtime.backends._torch_modules import load_module, run_module

    for head in (True, False):
        model, folder = model_of("vit", head=head), tmp_path / str(head)
        source = resolve(model, image_processor=processor_of("vit"))
        folder.mkdir()
        assert source.write_source(folder)
        names = [spec.name for spec in source.signature.outputs]
        feeds = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)}
        got = run_module(load_module(folder, source.signature, source.task), feeds, names)
        for name, array in source.reference(feeds).items():
            np.testing.assert_allclose(got[name], array, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({}, InvalidInputError, "needs its image processor: pass image_processor="),
        ({"image_processor": "/no/such"}, NotFoundError, "there is no such folder"),
        ({"image_processor": 5}, InvalidInputError, "is a int, and no transformers image processor"),
        ({"tokenizer": "x"}, InvalidInputError, "tokenizer= means nothing for a model of images"),
        ({"task": "text-classification"}, InvalidInputError, "image_processor= means nothing|tokenizer"),
        ({"labels": ["one"]}, InvalidInputError, "labels has 1 names, the model has 7 classes"),
        ({"shapes": {"sequence": (1, 2, 3)}}, InvalidInputError, "which this model has not"),
    ],
)
def test_arguments_that_do_not_fit_say_so(given, error, why):
    processor = {} if given in ({},) or "image_processor" in given else {"image_processor": processor_of("vit")}
    with pytest.raises(error, match=why):
        resolve(model_of("vit"), **{**processor, **given})


def test_a_processor_of_another_size_than_the_model_says_so():
    from transformers import ViTImageProcessorPil

    with pytest.raises(InvalidInputError, match="cannot be run on pixel_values of two images of 96 x 96"):
        resolve(model_of("vit"), image_processor=ViTImageProcessorPil(size={"height": 96, "width": 96}))


def test_a_folder_without_a_processor_says_so(tmp_path):
    model_of("vit").save_pretrained(str(tmp_path))
    with pytest.raises(InvalidInputError, match="has no image processor that can be read"):
        resolve(tmp_path)


def test_a_pipelines_settings_are_kept_or_told(tmp_path, caplog):
    from transformers import pipeline

    original = pipeline(
        "image-classification", model=model_of("vit"), image_processor=processor_of("vit"), function_to_apply="sigmoid",
        top_k=2, device="cpu",
    )  # fmt: skip
    assert resolve(original).task_config["function_to_apply"] == "sigmoid"
    assert "top_k=2 is not kept" in caplog.text


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier as a graph that somebody else exported, with a free and with a fixed number of images."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model_of("vit")

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    found = {}
    for rows in ("free", 2):
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        free = {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if rows == "free" else {}
        torch.onnx.export(
            Logits(), (torch.zeros(2, 3, 64, 64),), path, input_names=["pixel_values"], output_names=["logits"],
            dynamo=True, verbose=False, **free,
        )  # fmt: skip
        found[rows] = path
    return found


@pytest.mark.parametrize("rows", ["free", 2])
def test_a_graph_answers_as_the_pipeline_of_its_model(exported, rows, tmp_path):
    from transformers import pipeline

    original = pipeline(
        "image-classification", model=model_of("vit"), image_processor=processor_of("vit"), device="cpu"
    )
    source = resolve(exported[rows], task="image-classification", image_processor=processor_of("vit"), labels=LABELS)
    files = pictures(11)
    got = pipeline_of(source, tmp_path)(files)
    assert got == close_to(original([opened(file) for file in files]))


def test_a_graph_that_takes_something_else_says_so(exported):
    with pytest.raises(InvalidInputError, match=r"only input is pixel_values of float32 \[batch, 3, 32, 32\]"):
        resolve(
            exported["free"],
            task="image-classification",
            image_processor=_processor("ViT", size={"height": 32, "width": 32}),
        )
    with pytest.raises(InvalidInputError, match="needs a graph output named 'last_hidden_state'"):
        resolve(exported["free"], task="image-feature-extraction", image_processor=processor_of("vit"))
    with pytest.raises(InvalidInputError, match="shapes names 'batch', which is fixed"):
        resolve(
            exported[2], task="image-classification", image_processor=processor_of("vit"), labels=LABELS,
            shapes={"batch": (1, 2)},
        )  # fmt: skip
    with pytest.raises(InvalidInputError, match="needs its image processor"):
        resolve(exported["free"], task="image-classification")


def test_a_distilled_classifier_is_one(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTImageProcessorPil

    own = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = DeiTConfig(**own, image_size=64, patch_size=16, num_labels=7)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(str(tmp_path))
    size = {"height": 64, "width": 64}
    DeiTImageProcessorPil(size=size, crop_size=size).save_pretrained(str(tmp_path))
    source = resolve(tmp_path)
    assert source.task == "image-classification"
    assert source.reference({"pixel_values": np.zeros((1, 3, 64, 64), np.float32)})["logits"].shape == (1, 7)


def test_the_body_of_a_classifiers_folder_has_no_pooler_that_nobody_trained(tmp_path):
    folder = written("vit", tmp_path / "classifier")
    source = resolve(folder, task="image-feature-extraction")
    assert [spec.name for spec in source.signature.outputs] == ["last_hidden_state"]
    model = model_of("vit").base_model
    wanted = resolve(model, task="image-feature-extraction", image_processor=folder)
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)}
    np.testing.assert_allclose(
        source.reference(feeds)["last_hidden_state"], wanted.reference(feeds)["last_hidden_state"], atol=1e-5
    )


def test_a_model_that_returns_tuples_by_its_config_is_read(tmp_path):
    model = model_of("vit", head=False)
    model.config.return_dict = False
    names = [spec.name for spec in resolve(model, image_processor=processor_of("vit")).signature.outputs]
    assert names == ["last_hidden_state", "pooler_output"]


def test_code_beside_an_image_processor_never_runs(tmp_path, monkeypatch):
    written("vit", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import ViTImageProcessorPil as Own\n"
    )
    path = tmp_path / "preprocessor_config.json"
    said = {
        **json.loads(path.read_text()),
        "image_processor_type": "Own",
        "auto_map": {"AutoImageProcessor": "own.Own"},
    }
    path.write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InvalidInputError, match="has no image processor that can be read"):
        resolve(tmp_path)
    assert not ran.exists()


def test_a_processor_without_means_is_refused_in_words():
    class Odd(type(processor_of("vit"))):
        """Normalizes by each image's own numbers."""

    processor = Odd(size={"height": 64, "width": 64})
    processor.image_mean = None
    with pytest.raises(InvalidInputError, match="Odd cannot be reproduced: It normalizes by numbers of each image"):
        processor_settings(processor)


def test_clips_embedding_is_what_comes_first_as_for_the_pipeline(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, pipeline

    own = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**own, image_size=64, patch_size=16, projection_dim=16)
    ).eval()
    original = pipeline("image-feature-extraction", model=model, image_processor=processor_of("vit"), device="cpu")
    source = resolve(original)
    assert source.signature.outputs[0].name == "image_embeds"
    files = pictures(3)
    wanted = original([opened(file) for file in files])
    np.testing.assert_allclose(pipeline_of(source, tmp_path)(files), np.asarray(wanted), atol=1e-5)
    (tmp_path / "kept").mkdir()
    assert source.write_source(tmp_path / "kept")
    from mlflow_tdeploy.runtime.backends._torch_modules import load_module

    assert load_module(tmp_path / "kept", source.signature, source.task) is not None


def test_a_model_of_texts_and_images_names_its_halves():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = CLIPModel(CLIPConfig(text_config=small, vision_config={**small, "image_size": 64, "patch_size": 16}))
    for more in ({"task": "image-feature-extraction", "image_processor": processor_of("vit")}, {}):
        with pytest.raises(InvalidInputError, match="CLIPVisionModel.*from_pretrained.* with image_processor="):
            resolve(model, **more)


def test_a_graph_of_images_tells_its_task_by_its_output(exported):
    source = resolve(exported["free"], image_processor=processor_of("vit"), labels=LABELS)
    assert source.task == "image-classification"


def test_a_body_is_no_classifier(tmp_path):
    folder = written("vit", tmp_path, head=False)
    with pytest.raises(InvalidInputError, match="the head that the task needs would be random"):
        resolve(folder, task="image-classification")
