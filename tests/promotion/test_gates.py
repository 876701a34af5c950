"""What a version has to pass before it answers: its files, a budget of the deployment, answers on labelled texts."""

from __future__ import annotations

import json

import mlflow
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError
from mlflow_tdeploy.core.labelled import Labelled
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.spec import Spec
from tests.core.text_assets import LABELS
from tests.flavor import text_bundles
from tests.flavor.text_bundles import HEAD, embed, make_text_bundle

TEXTS = ["a film", "good film", "bad film", "good", "bad", "a good film", "a bad film", "film"]
RIGHT = [LABELS[int((embed(text) @ HEAD).argmax())] for text in TEXTS]


@pytest.fixture
def classes(tracking, tmp_path, monkeypatch):
    """Two versions of a classifier: of the second one the classes are turned round."""
    for number, head in enumerate((HEAD, -HEAD)):
        monkeypatch.setattr(text_bundles, "HEAD", head)
        made = make_text_bundle(tmp_path / str(number), "text-classification")
        mlflow_tdeploy.log_model(made, "classes", registered_model_name="classes")
    found = mlflow.MlflowClient()
    found.set_registered_model_alias("classes", "champion", 1)
    return found


@pytest.fixture
def write(running, tmp_path):
    triton, repository = running

    def spec(more):
        (tmp_path / "tdeploy.yaml").write_text(
            f"targets: {{here: {{server: '{triton.url}', repository: '{repository}'}}}}\n"
            f"models: [{{name: classes, alias: champion, to: here, {more}}}]\n"
        )
        return Spec.read(tmp_path / "tdeploy.yaml")

    yield spec
    found = spec("serve: {}")
    deployments_at(found.targets["here"], found.targets["here"].servers[0]).delete("classes")


SERVE = "serve: {device: cpu, variant: onnx-fp32, grace: 0}"


def serving(spec):
    route = deployments_at(spec.targets["here"], spec.targets["here"].servers[0]).serving("classes")
    return route.active if route else None


def test_a_version_that_is_worse_on_labelled_texts_does_not_come(classes, write, tmp_path):
    (tmp_path / "labelled.csv").write_text("text,label\n" + "".join(map("{},{}\n".format, TEXTS, RIGHT)))
    spec = write(f"{SERVE}, gates: {{metric: {{data: labelled.csv, worse_by: 0.1}}}}")
    plan = mlflow_tdeploy.plan(spec)
    assert [one.gate for one in plan.steps[0].verdicts] == ["variant", "bundle", "signature", "metric"]
    mlflow_tdeploy.promote("models:/classes/1", alias="champion", file=spec)
    classes.set_registered_model_alias("classes", "champion", 2)
    (step,) = mlflow_tdeploy.plan(spec).steps
    assert step.verdicts[-1].why == "accuracy on 'labelled.csv', at most 0.1 worse: is asked on the server"
    classes.set_registered_model_alias("classes", "champion", 1)
    with pytest.raises(
        MlflowException, match=r"accuracy of version 2 on 'labelled.csv' \(8 texts\) is .* serves 1: worse"
    ):
        mlflow_tdeploy.promote("models:/classes/2", alias="champion", file=spec)
    assert serving(spec) == 1
    assert int(dict(classes.get_registered_model("classes").aliases)["champion"]) == 1
    assert "worse by more than 0.1" in dict(classes.get_model_version("classes", "2").tags)["tdeploy.here.classes"]

    lines = "".join(f'{{"text": "{text}", "label": "{label}"}}\n' for text, label in zip(TEXTS, RIGHT, strict=True))
    (tmp_path / "labelled.jsonl").write_text(lines)
    spec = write(f"{SERVE}, gates: {{metric: {{data: labelled.jsonl, worse_by: 1.0}}}}")
    mlflow_tdeploy.promote("models:/classes/2", alias="champion", file=spec)
    assert serving(spec) == 2


def test_entities_are_gated_by_their_f1(tracking, write, tmp_path, monkeypatch):
    registry = mlflow.MlflowClient()
    for number, head in enumerate((HEAD, -HEAD)):
        monkeypatch.setattr(text_bundles, "HEAD", head)
        made = make_text_bundle(tmp_path / str(number), "token-classification")
        mlflow_tdeploy.log_model(made, "classes", registered_model_name="classes")
    registry.set_registered_model_alias("classes", "champion", 1)
    right = mlflow_tdeploy.load_model("models:/classes/1").predict(TEXTS, {"aggregation_strategy": "simple"})
    rows = ({"text": text, "label": found} for text, found in zip(TEXTS, right, strict=True))
    (tmp_path / "spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = write(f"{SERVE}, gates: {{metric: {{data: spans.jsonl, worse_by: 0.1}}}}")
    mlflow_tdeploy.promote("models:/classes/1", alias="champion", file=spec)
    with pytest.raises(MlflowException, match=r"f1 of version 2 on 'spans.jsonl' \(8 texts\) is .* serves 1: worse"):
        mlflow_tdeploy.promote("models:/classes/2", alias="champion", file=spec)
    assert serving(spec) == 1


def test_labels_that_are_none_of_the_models_are_told_and_nothing_comes(classes, write, tmp_path):
    (tmp_path / "labelled.csv").write_text("text,label\na film,nonsense\n")
    spec = write(f"{SERVE}, gates: {{metric: {{data: labelled.csv}}}}")
    with pytest.raises(MlflowException, match="is no label of the model"):
        mlflow_tdeploy.promote("models:/classes/1", alias="champion", file=spec)
    assert serving(spec) is None


def test_a_task_without_a_metric_is_refused_in_the_plan(tracking, write, tmp_path):
    made = make_text_bundle(tmp_path / "words")
    mlflow_tdeploy.log_model(made, "words", registered_model_name="classes")
    mlflow.MlflowClient().set_registered_model_alias("classes", "champion", 1)
    (tmp_path / "labelled.csv").write_text("text,label\na film,1\n")
    for more in ("data: labelled.csv", "data: labelled.csv, name: f1"):
        (step,) = mlflow_tdeploy.plan(write(f"{SERVE}, gates: {{metric: {{{more}}}}}")).steps
        # nothing serves yet, and it would be asked all the same
        assert step.action == "refuse"
        assert "has no metric on labelled data" in step.why


def test_a_file_of_the_variant_that_is_gone_is_found_without_bringing_it(classes, write, tmp_path):
    files = sorted((tmp_path / "artifacts").glob("models/*/artifacts/tdeploy/files/onnx-fp32/model.onnx"))
    kept = files[0].read_bytes()
    for content, word in ((None, "gone"), (kept[:-1], "damaged")):
        for file in files:
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
        (step,) = mlflow_tdeploy.plan(write(SERVE)).steps
        assert (step.action, step.verdicts[-1].gate) == ("refuse", "bundle")
        assert f"is {word}: log it again." in step.why


def test_a_budget_of_the_deployment_chooses_among_the_variants(classes, write):
    plain = "serve: {device: cpu, grace: 0}"
    (step,) = mlflow_tdeploy.plan(write(plain)).steps
    assert step.variants[1] == "ort-cpu-int8"
    (step,) = mlflow_tdeploy.plan(
        write("serve: {device: cpu, grace: 0, budget: {max_score_difference: 1.0e-12}}")
    ).steps
    assert step.variants[1] == "onnx-fp32"
    assert "over the deployment's budget: max_score_difference" in step.why
    (step,) = mlflow_tdeploy.plan(
        write("serve: {device: cpu, grace: 0, variant: ort-cpu-int8, budget: max_score_difference <= 1e-12}")
    ).steps
    assert step.action == "refuse"
    with pytest.raises(InvalidInputError, match=r"line 2, 'models\[0\].serve.budget': Unknown metric 'speed'"):
        write("serve: {budget: {speed: 1}}")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "words,label\nx,1\n", "neither CSV or TSV with the columns text and label"),
        ("a.csv", "text,label\n", "holds no texts"),
        ("a.jsonl", "{", "neither CSV"),
        ("a.jsonl", '{"text": 1, "label": 2}\n', "holds no texts"),
        ("a.jsonl", "[1]\n", "neither CSV"),
    ],
)
def test_a_file_that_is_no_labelled_texts_is_told(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=why):
        Labelled.read(tmp_path / name)
    with pytest.raises(NotFoundError):
        Labelled.read(tmp_path / "none.csv")


def test_a_file_that_is_not_there_is_told_with_its_line(write):
    with pytest.raises(InvalidInputError, match=r"line 2, 'models\[0\].gates.metric.data': there is no file"):
        write(f"{SERVE}, gates: {{metric: {{data: none.csv}}}}")
