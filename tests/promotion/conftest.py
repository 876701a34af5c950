"""A real Triton for promotions."""

from __future__ import annotations

import mlflow
import pytest

import mlflow_tdeploy
from mlflow_tdeploy.deploy.ends import notes_of
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.spec import Spec
from tests.deploy.conftest import alive, running, s3_keys, s3_server, target  # noqa: F401
from tests.flavor.text_bundles import make_text_bundle
from tests.promotion.one_server import there
from tests.triton.conftest import _ending, server, start  # noqa: F401


def log_words(folder):
    """Register two versions of a model and call the first one champion; return the registry."""
    for number in range(2):
        made = make_text_bundle(folder / str(number))
        mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    found = mlflow.MlflowClient()
    found.set_registered_model_alias("words", "champion", 1)
    return found


@pytest.fixture
def words(tracking, tmp_path):
    return log_words(tmp_path)


@pytest.fixture
def champion(words):
    """Return what gives the alias to a version."""
    return lambda version: words.set_registered_model_alias("words", "champion", version)


@pytest.fixture
def two(start, tmp_path):  # noqa: F811
    """Two servers, each with a repository of its own, and the file that names them."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first, second = map(start, folders)
    servers = [
        f"{{url: '{one.url}', repository: '{where}'}}" for one, where in zip((first, second), folders, strict=True)
    ]
    text = f"targets: {{both: {{servers: [{', '.join(servers)}]}}}}\n"
    text += "models: [{name: words, alias: champion, to: both, serve: {device: cpu, variant: onnx-fp32, grace: 0}}]\n"
    (tmp_path / "tdeploy.yaml").write_text(text)
    return Spec.read(tmp_path / "tdeploy.yaml"), second


@pytest.fixture
def versions(two):
    """Return which version each server answers with."""
    spec, _ = two

    def look(count=2):
        found = []
        for one in spec.targets["both"].servers[:count]:
            serving = deployments_at(spec.targets["both"], one).serving("words")
            found.append(serving.active if serving else None)
        return found

    return look


@pytest.fixture
def spec_of(running, tmp_path):  # noqa: F811
    """Return what makes a file about one server; what a test deploys there goes."""
    triton, folder = running

    def make(more="", variant="onnx-fp32"):
        text = f"targets: {{both: {{servers: [{{url: '{triton.url}', repository: '{folder}'}}]}}}}\n"
        text += f"models: [{{name: words, alias: champion, to: both, serve: {{device: cpu, variant: '{variant}', grace: 0{more}}}}}]\n"  # noqa: E501 - one rule
        (tmp_path / "tdeploy.yaml").write_text(text)
        return Spec.read(tmp_path / "tdeploy.yaml")

    yield make
    for name in ("words", "words-too"):
        there(make()).delete(name)
        (folder / notes_of(name)).unlink(missing_ok=True)  # of what was never deployed
