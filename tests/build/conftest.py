"""Bundles that several tests of the build look at; nobody writes to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.report import BuildReport
from mlflow_tdeploy.build.verify_data import VerifyData, default_texts
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.store.writer import BundleDraft

#: Labels that have nothing to do with the texts: a random model's accuracy on them is some number.
LABELS = ["no", "maybe", "yes"]


@pytest.fixture(scope="session")
def labelled() -> VerifyData:
    texts = default_texts()[:210]
    return VerifyData.of({"text": list(texts), "label": [LABELS[len(text) % 3] for text in texts]}, name="glosses")


@pytest.fixture(scope="session")
def tiny_build(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, labelled: VerifyData
) -> tuple[Path, BuildReport]:
    """A tiny classifier's bundle with every variant, and the report of its build."""
    target = tmp_path_factory.mktemp("tiny") / "model"
    source = resolve(tiny_bert, shapes={"batch": (1, 4, 8), "sequence": (1, 16, 64)})
    with staged_directory(target) as folder:
        report = build_bundle(source, BundleDraft(folder / "tdeploy"), BuildOptions(data=labelled, seconds=1.0))
    source.close()
    return target, report


@pytest.fixture(scope="session")
def tiny_bundle(tiny_build: tuple[Path, BuildReport]) -> Path:
    """The model directory of the tiny classifier's bundle."""
    return tiny_build[0]


@pytest.fixture
def register():
    added = []

    def add(recipe):
        RECIPES.names()  # load the real ones first
        RECIPES.register(recipe.id)(recipe)
        added.append(recipe.id)

    yield add
    for name in added:
        RECIPES.unregister(name)
