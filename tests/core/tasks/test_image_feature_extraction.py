from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.image_models import MODELS, model_of, processor_of, written
from tests.pictures import odd, opened, pictures
from tests.served import pipeline_of


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The pipeline of transformers, and ours."""
    from transformers import pipeline

    folder = written(request.param, tmp_path_factory.mktemp("images"), head=False)
    original = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    return original, pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


@pytest.mark.parametrize("pool", [False, True])
def test_predict_equals_the_pipeline_for_real_and_odd_pictures(both, pool):
    original, ours = both
    files = [*pictures(200), *odd()]
    wanted = original([opened(file) for file in files], pool=pool)
    got = ours(files, {"pool": pool})
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, np.asarray(theirs, np.float32), atol=2e-5)


def test_a_model_without_a_pooler_says_so(tmp_path):
    from transformers import ViTModel

    config = model_of("vit", head=False).config
    model = ViTModel(config, add_pooling_layer=False)
    ours = pipeline_of(resolve(model, image_processor=processor_of("vit")), tmp_path)
    assert [spec.name for spec in ours.task.signature.outputs] == ["last_hidden_state"]
    file = pictures(1)[0]
    assert ours([file])[0].shape == (1, 17, 64)
    with pytest.raises(InvalidInputError, match="has no pooler"):
        ours([file], {"pool": True})


def test_the_body_of_a_classifier_gives_what_automodel_gives(tmp_path):
    from transformers import ViTModel

    classifier = model_of("vit")
    ours = pipeline_of(
        resolve(classifier, task="image-feature-extraction", image_processor=processor_of("vit")), tmp_path
    )
    assert isinstance(classifier.base_model, ViTModel)
    file = pictures(1)[0]
    pixels = processor_of("vit")(images=opened(file).convert("RGB"), return_tensors="pt")
    wanted = classifier.base_model(**pixels).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(ours([file])[0], wanted, atol=2e-5)
