from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec

import mlflow_tdeploy
from mlflow_tdeploy.flavor.requirements import get_default_conda_env, get_default_pip_requirements
from mlflow_tdeploy.store.bundle import Bundle
from tests.build.sources import EXAMPLE, Mlp
from tests.bundles import make_bundle
from tests.flavor.text_bundles import embed, make_text_bundle


@pytest.fixture
def made(tmp_path):
    """A finished bundle of sentence embeddings."""
    return make_text_bundle(tmp_path / "made")


@pytest.fixture
def save(tmp_path, made):
    """Return a function that saves it with parameters and returns the folder."""

    def make(**arguments) -> Path:
        mlflow_tdeploy.save_model(made, tmp_path / "model", **arguments)
        return tmp_path / "model"

    return make


def lines(folder: Path) -> list[str]:
    return (folder / "requirements.txt").read_text().split()


def test_save_model_writes_both_flavors(save):
    model = Model.load(str(save()))
    flavor = model.flavors["tdeploy"]
    assert flavor["data"] == "tdeploy"
    assert flavor["task"] == "sentence-embedding"
    assert flavor["tdeploy_version"]
    pyfunc = model.flavors["python_function"]
    assert pyfunc["loader_module"] == "mlflow_tdeploy"
    assert pyfunc["env"] == {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
    assert pyfunc["config"]["threads"] == 0
    assert model.signature.inputs is None  # MLflow would drop columns before the task sees them
    assert model.signature.outputs == Schema([TensorSpec(np.dtype("float32"), (-1, 4))])


def test_save_model_round_trips_natively(save):
    with mlflow_tdeploy.load_model(str(save())) as model:
        np.testing.assert_allclose(model.predict(["good film"])[0], embed("good film"), rtol=1e-3)
        assert model.decision.chosen.variant == "ort-cpu-int8"
        assert sorted(model.variants) == ["onnx-fp32", "ort-cpu-int8"]
        ids = np.array([[3, 5]], np.int64)
        out = model.infer({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        np.testing.assert_allclose(out["sentence_embedding"][0], embed("good film"), rtol=1e-3)


def test_save_model_records_the_size_of_everything(save):
    folder = save()
    rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "MLmodel")
    assert Model.load(str(folder)).model_size_bytes == rest


def test_save_model_refuses_a_path_that_is_not_empty_and_leaves_it_alone(made, tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "file").write_text("mine")
    with pytest.raises(MlflowException, match="exists already and is not an empty folder") as caught:
        mlflow_tdeploy.save_model(made, target)
    assert caught.value.error_code == "RESOURCE_ALREADY_EXISTS"
    assert [path.name for path in target.iterdir()] == ["file"]


def test_save_model_takes_an_empty_folder(made, tmp_path):
    (tmp_path / "empty").mkdir()
    mlflow_tdeploy.save_model(made, tmp_path / "empty")
    assert Bundle.open(tmp_path / "empty").variants


@pytest.mark.parametrize(
    "arguments",
    [
        {"signature": ModelSignature(inputs=Schema([ColSpec("long")]))},
        {"code_paths": ["no/such/path"]},
        {"extra_files": ["no/such/file"]},
        {"conda_env": "no/such/conda.yaml"},
        {"pip_requirements": "no/such/requirements.txt", "conda_env": {}},
        {"model_config": {"variant": 3}},
        {"model_config": {"temperature": 3}},
        {"on_budget": "ignore"},
        {"precisions": "int8"},
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_save_model_leaves_nothing_when_it_fails(made, tmp_path, arguments):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Exception):  # noqa: B017 - some of these are MLflow's own, of several classes
        mlflow_tdeploy.save_model(made, tmp_path / "model", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_save_model_refuses_a_bundle_with_a_changed_weight(made, tmp_path):
    weights = made / "tdeploy" / "files" / "ort-cpu-int8" / "model.onnx"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(MlflowException, match="ort-cpu-int8/model.onnx' was changed"):
        mlflow_tdeploy.save_model(made, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_save_model_copies_only_what_is_recorded_when_given_a_finished_bundle(made, tmp_path):
    (tmp_path / "secret").write_text("secret")
    root = made / "tdeploy"
    (root / "report").mkdir()
    (root / "report" / "index.html").symlink_to(tmp_path / "secret")
    (root / "files" / "evil.pkl").write_bytes(b"pickle")
    (root / "evidence" / "nobody").mkdir()
    (root / "evidence" / "nobody" / "x.json").write_text("{}")
    before = Bundle.open(made)
    mlflow_tdeploy.save_model(made, tmp_path / "model")
    after = Bundle.open(tmp_path / "model")
    assert (after.manifest, after.variants) == (before.manifest, before.variants)
    assert [after.evidence(name) for name in after.variants] == [before.evidence(name) for name in before.variants]
    recorded = {record.path for variant in after.variants.values() for record in variant.files}
    recorded |= {record.path for record in (*after.manifest.assets, *after.manifest.golden)}
    files = {path.relative_to(after.root).as_posix() for path in after.root.rglob("*") if path.is_file()}
    assert files == recorded | set(after.record_paths()) | {"records.zip"}
    packed = {name for name in zipfile.ZipFile(after.root / "records.zip").namelist() if not name.startswith("files/")}
    assert packed == files - {"records.zip"} - {path for path in files if path.startswith("files/")}


def test_save_model_refuses_a_bundle_with_a_file_planted_beside_a_graph(made, tmp_path):
    (made / "tdeploy" / "files" / "onnx-fp32" / "evil.bin").write_bytes(b"weights")
    with pytest.raises(MlflowException, match=r"evil\.bin' lies in its folder and is not recorded"):
        mlflow_tdeploy.save_model(made, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_save_model_refuses_a_bundle_with_changed_golden_requests(tmp_path):
    made = make_bundle(tmp_path / "made")
    golden = made / "tdeploy" / "golden" / "golden.json"
    golden.write_text(golden.read_text() + " ")
    with pytest.raises(MlflowException, match="golden.json"):
        mlflow_tdeploy.save_model(made, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_token_never_shows_in_what_is_printed():
    from mlflow_tdeploy.flavor.source import BundleRequest
    from mlflow_tdeploy.source._options import Options

    assert "hf_secret" not in repr(BundleRequest(token="hf_secret")) + repr(Options(token="hf_secret"))


def test_save_model_refuses_build_parameters_for_a_finished_bundle(made, tmp_path):
    with pytest.raises(MlflowException, match="finished bundle.*leave out budget, precisions|precisions, budget"):
        mlflow_tdeploy.save_model(made, tmp_path / "model", precisions=["int8"], budget="worst_cosine >= 0.5")


# requirements


def test_default_requirements_hold_no_torch_and_are_pinned(save):
    found = lines(save())
    assert found == get_default_pip_requirements()
    names = [line.split("==")[0].split("[")[0] for line in found]
    assert {"mlflow", "mlflow-tdeploy", "onnxruntime", "numpy", "tokenizers"} == set(names)
    assert all("==" in line and "+" not in line for line in found)


def test_default_requirements_hold_torch_when_only_the_original_can_serve(made):
    variants = Bundle.open(made).variants.values()
    original = dataclasses.replace(next(iter(variants)), id="hf", format="hf")
    dropped = [dataclasses.replace(variant, files=()) for variant in variants]
    found = " ".join(get_default_pip_requirements([original, *dropped]))
    assert "torch==" in found
    needing = dataclasses.replace(original, requires={"sentence-transformers": "6"})
    assert any(line.startswith("sentence-transformers==") for line in get_default_pip_requirements([needing]))
    assert "transformers==" in found
    assert "+cpu" not in found
    assert "torch" not in " ".join(get_default_pip_requirements([original, *variants]))


def test_save_model_uses_given_requirements_instead_of_the_default(save):
    assert lines(save(pip_requirements=["mlflow", "coolpackage==1.2"])) == ["mlflow", "coolpackage==1.2"]


def test_save_model_reads_requirements_and_constraints_from_a_file(save, tmp_path):
    (tmp_path / "constraints.txt").write_text("numpy<3")
    (tmp_path / "requirements.txt").write_text(f"coolpackage\n-c {tmp_path / 'constraints.txt'}")
    folder = save(pip_requirements=str(tmp_path / "requirements.txt"))
    assert "coolpackage" in lines(folder)
    assert (folder / "constraints.txt").read_text() == "numpy<3"


def test_save_model_adds_extra_requirements_to_the_default(save):
    found = lines(save(extra_pip_requirements=["coolpackage==1.2"]))
    assert "coolpackage==1.2" in found
    assert set(get_default_pip_requirements()) <= set(found)


@pytest.mark.parametrize("as_file", [True, False])
def test_save_model_keeps_a_given_conda_env(save, tmp_path, as_file):
    env = {"name": "mine", "dependencies": ["python=3.11", {"pip": ["mlflow", "coolpackage==1.2"]}]}
    path = tmp_path / "env.yaml"
    path.write_text(yaml.safe_dump(env))
    folder = save(conda_env=str(path) if as_file else env)
    assert yaml.safe_load((folder / "conda.yaml").read_text()) == env
    assert lines(folder) == ["mlflow", "coolpackage==1.2"]


def test_default_conda_env_holds_the_default_requirements(save):
    folder = save()
    saved = yaml.safe_load((folder / "conda.yaml").read_text())
    assert saved["dependencies"][-1]["pip"] == get_default_conda_env()["dependencies"][-1]["pip"]
    assert yaml.safe_load((folder / "python_env.yaml").read_text())["dependencies"] == ["-r requirements.txt"]


def test_save_model_refuses_a_conda_env_and_requirements_together(save):
    with pytest.raises(ValueError, match="Only one of"):
        save(conda_env={}, pip_requirements=["mlflow"])


def test_save_model_puts_a_wheel_into_the_model_when_the_environment_names_one(save, tmp_path, monkeypatch):
    wheel = tmp_path / "mlflow_tdeploy-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    monkeypatch.setenv("TDEPLOY_WHEEL", str(wheel))
    folder = save()
    assert f"wheels/{wheel.name}" in lines(folder)
    assert not any(line.startswith("mlflow-tdeploy") for line in lines(folder))
    assert (folder / "wheels" / wheel.name).read_bytes() == b"wheel"
    assert mlflow.pyfunc.load_model(str(folder)).predict(["good"]).shape == (1, 4)


def test_save_model_refuses_a_wheel_that_is_none(save, monkeypatch):
    monkeypatch.setenv("TDEPLOY_WHEEL", "torch-2.0.whl")
    with pytest.raises(MlflowException, match="TDEPLOY_WHEEL must name a wheel of mlflow-tdeploy"):
        save()


# what else comes with a model


def test_save_model_stores_code_that_both_loaders_can_import(save, tmp_path, monkeypatch):
    (tmp_path / "ownpackage").mkdir()
    (tmp_path / "ownpackage" / "__init__.py").write_text("VALUE = 42")
    folder = save(code_paths=[str(tmp_path / "ownpackage")])
    shutil.rmtree(tmp_path / "ownpackage")
    for load in (mlflow_tdeploy.load_model, mlflow.pyfunc.load_model):
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if str(folder) not in entry])
        sys.modules.pop("ownpackage", None)
        load(str(folder))
        import ownpackage

        assert ownpackage.VALUE == 42
    sys.modules.pop("ownpackage", None)


def test_save_model_stores_metadata_and_extra_files(save, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    folder = save(metadata={"team": "search"}, extra_files=[str(tmp_path / "notes.txt")])
    model = Model.load(str(folder))
    assert model.metadata == {"team": "search"}
    (entry,) = model.flavors["tdeploy"]["extra_files"]
    assert (folder / entry["path"]).read_text() == "hello"


def test_save_model_stores_the_input_example(save):
    folder = save(input_example=["a good film"])
    model = mlflow.pyfunc.load_model(str(folder))
    assert model.predict(model.input_example).shape == (1, 4)
    assert json.loads((folder / "serving_input_example.json").read_text())


@pytest.mark.parametrize("example", [None, ["a good film"], pd.DataFrame({"text": ["a good film"]})])
def test_a_text_model_sees_whole_requests_whatever_the_example(save, example):
    """A schema read off the example would make MLflow drop columns, or refuse everything but tables."""
    served = mlflow.pyfunc.load_model(str(save(input_example=example)))
    table = pd.DataFrame({"title": ["bad"], "text": ["a good film"]})
    for request in ("a good film", ["a good film"], pd.Series(["a good film"], name="plot"), table):
        np.testing.assert_allclose(served.predict(request)[0], embed("a good film"), rtol=1e-3)


def test_a_signature_of_the_users_is_kept_with_a_warning_where_it_cuts_tables(save, caplog):
    folder = save(signature=ModelSignature(Schema([ColSpec("string")])))
    assert "nothing but the first column" in caplog.text
    assert Model.load(str(folder)).signature.inputs == Schema([ColSpec("string")])
    assert mlflow.pyfunc.load_model(str(folder)).predict(["a good film"]).shape == (1, 4)


def test_save_model_stores_arrays_as_input_example(tmp_path):
    x = np.array([[1, 2, 3, 4]], np.float32)
    mlflow_tdeploy.save_model(make_bundle(tmp_path / "made"), tmp_path / "model", input_example={"x": x})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert model.predict(model.input_example)["y"].shape == (1, 3)


def test_save_model_keeps_a_given_signature(save):
    given = ModelSignature(inputs=Schema([ColSpec("string", "review")]))
    folder = save(signature=given)
    assert Model.load(str(folder)).signature.inputs == given.inputs
    model = mlflow.pyfunc.load_model(str(folder))
    import pandas as pd

    assert model.predict(pd.DataFrame({"review": ["good"], "other": [1]})).shape == (1, 4)


def test_save_model_reads_model_config_from_a_file(save, tmp_path):
    (tmp_path / "config.yaml").write_text("variant: onnx-fp32\nthreads: 2\n")
    config = Model.load(str(save(model_config=str(tmp_path / "config.yaml")))).flavors["python_function"]["config"]
    assert (config["variant"], config["threads"], config["arena"]) == ("onnx-fp32", 2, True)


def test_saved_model_holds_no_path_of_this_machine(save):
    folder = save()
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".txt", ".yaml") or path.name == "MLmodel":
            assert str(folder.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signature": "x"}, "signature must be a ModelSignature, got str"),
        ({"code_paths": ["no_such_file.py"]}, "code_paths: there is no 'no_such_file.py'"),
        ({"code_paths": "code.py"}, "code_paths must be a list"),
        ({"extra_files": ["no/such"]}, "extra_files: there is no 'no/such'"),
    ],
)
def test_save_model_refuses_wrong_parameters_before_it_looks_at_the_model(tmp_path, arguments, message):
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.save_model(object(), tmp_path / "model", **arguments)
    assert not list(tmp_path.iterdir())


def test_save_model_refuses_a_model_config_with_which_nothing_could_serve(tmp_path, made, caplog):
    def save(model, **config):
        mlflow_tdeploy.save_model(
            model, tmp_path / "model", model_config=config, example=EXAMPLE if model is not made else None,
            precisions=["fp32"] if model is not made else None,
        )  # fmt: skip

    steps = []
    with pytest.raises(MlflowException, match="names the variant 'nope', which this model cannot have. Possible: .*hf"):
        mlflow_tdeploy.save_model(
            Mlp().eval(), tmp_path / "model", example=EXAMPLE, model_config={"variant": "nope"}, progress=steps.append
        )
    assert steps == []  # at once, not after minutes
    with pytest.raises(MlflowException, match="insists on the variant 'ort-cpu-int8'.*it was not made"):
        save(Mlp().eval(), variant="ort-cpu-int8")
    with pytest.raises(MlflowException, match="Unknown runtime 'nope'"):
        save(made, runtime="nope")
    with pytest.raises(MlflowException, match="insists on the variant 'nope'"):
        save(made, variant="nope")
    with pytest.raises(MlflowException, match="runtime 'torch', which does not open any variant of this model"):
        save(made, runtime="torch")
    with pytest.raises(MlflowException, match="runtime 'torch', which does not open the variant 'onnx-fp32'"):
        save(made, variant="onnx-fp32", runtime="torch")
    assert not (tmp_path / "model").exists()


def test_save_model_refuses_requirements_that_name_a_file_that_is_not_there(made, tmp_path):
    with pytest.raises(MlflowException, match=r"not there: '.*no-such\.txt'") as caught:
        mlflow_tdeploy.save_model(made, tmp_path / "model", pip_requirements=["numpy", "-c no-such.txt"])
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    assert not (tmp_path / "model").exists()


def test_save_model_warns_of_requirements_that_leave_this_package_out(made, tmp_path, caplog):
    mlflow_tdeploy.save_model(made, tmp_path / "a", pip_requirements=["numpy"])
    assert "leave out mlflow-tdeploy" in caplog.text
    caplog.clear()
    mlflow_tdeploy.save_model(made, tmp_path / "b", extra_pip_requirements=["pandas"])
    assert caplog.text == ""


def test_save_model_refuses_build_parameters_for_a_finished_bundle_whatever_their_type(made, tmp_path):
    with pytest.raises(MlflowException, match="leave out verify_with"):
        mlflow_tdeploy.save_model(made, tmp_path / "model", verify_with=pd.DataFrame({"text": ["a"], "label": ["b"]}))
