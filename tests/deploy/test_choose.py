"""What is looked at for a plan, and what is made sure of before a version goes to a server."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.deploy import choose as module
from mlflow_tdeploy.deploy.choose import choose
from mlflow_tdeploy.deploy.settings import DeploySettings
from tests.flavor.text_bundles import make_text_bundle


@pytest.fixture
def bundle(tmp_path):
    return make_text_bundle(tmp_path / "m", "text-classification")


def test_a_plan_takes_no_tokenizer_and_a_deployment_tries_it(bundle, monkeypatch):
    def other_tokens(task, requests):
        raise IntegrityError("A golden request becomes another 'input_ids' on this host")

    monkeypatch.setattr(module, "check_encoding", other_tokens)
    assert choose(str(bundle), DeploySettings(), name="m", look=True).variant.id == "ort-cpu-int8"
    with pytest.raises(IntegrityError, match="input_ids"):
        choose(str(bundle), DeploySettings(), name="m")


def test_a_plan_refuses_damaged_assets(bundle):
    asset = next(path for path in (bundle / "tdeploy/assets").iterdir() if path.is_file())
    asset.write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=asset.name):
        choose(str(bundle), DeploySettings(), name="m", look=True)
