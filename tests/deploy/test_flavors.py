"""What others have logged, deployed as it is: plain ONNX graphs and models that are written for Triton."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import mlflow
import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.deploy import found
from tests.bundles import WEIGHTS

SAVED = {"grace": 0}
X = np.array([[1, 2, 3, 4], [0, 1, 0, 1]], np.float32)

#: A model of Triton's Python backend that has only texts, and says which version it is.
SHOUT = """
import pathlib
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        here = pathlib.Path(__file__).parent
        self.mark = (here / "mark.txt").read_bytes() + (here.parent / "labels.txt").read_bytes()

    def execute(self, requests):
        answers = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            loud = np.vectorize(lambda one: one.upper() + self.mark, otypes=[object])(texts)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("LOUD", loud)]))
        return answers
"""
SHOUT_CONFIG = """
name: "anything"
backend: "python"
max_batch_size: 4
input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "LOUD" data_type: TYPE_STRING dims: [ 1 ] }
instance_group { count: 1 kind: KIND_CPU }
"""


def graph(factor: float = 1.0, hidden: int = 4) -> onnx.ModelProto:
    """Return a graph whose weights are large enough to lie beside it."""
    weights = np.vstack([WEIGHTS * np.float32(factor), np.zeros((hidden - 4, 3), np.float32)])
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ready(folder: Path, mark: str = "!", number: int = 3, config: str = SHOUT_CONFIG) -> Path:
    """Write a model as somebody writes it for Triton: labels beside its version, an older version, an empty folder."""
    for version, text in ((number - 1, "old"), (number, mark)):
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / "model.py").write_text(SHOUT)
        (folder / str(version) / "mark.txt").write_text(text)
    (folder / str(number) / "assets").mkdir()
    (folder / "labels.txt").write_text("?")
    (folder / "config.pbtxt").write_text(config)
    return folder


def log_folder(folder: Path, name: str) -> str:
    """Log a folder as artifacts and return its URI."""
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), name)
    return f"runs:/{run.info.run_id}/{name}"


@pytest.mark.slow
def test_an_onnx_model_of_mlflow_is_deployed_with_its_external_data(client):
    for factor in (1.0, 2.0):
        mlflow.onnx.log_model(graph(factor, 400), name="linear", registered_model_name="linear")
    made = client.create_deployment("linear", "models:/linear/1", config=SAVED)
    assert (made["flavor"], made["version"], made["variant"], made["ready"]) == ("onnx", 1, "onnx-fp32", True)
    wide = np.hstack([X, np.ones((2, 396), np.float32)])
    np.testing.assert_allclose(client.predict("linear", {"x": wide})["predictions"]["y"], X @ WEIGHTS, rtol=1e-5)
    updated = client.update_deployment("linear", "models:/linear/2", flavor="onnx")
    assert (updated["version"], updated["previous"]) == (2, [1])
    np.testing.assert_allclose(client.predict("linear", wide)["predictions"]["y"], X @ WEIGHTS * 2, rtol=1e-5)
    assert client.rollback_deployment("linear")["version"] == 1


@pytest.mark.slow
def test_a_graph_is_read_once_and_found_again(client, monkeypatch):
    mlflow.onnx.log_model(graph(), name="linear", registered_model_name="linear")
    client.create_deployment("linear", "models:/linear/1", config=SAVED)
    monkeypatch.setattr(found, "_read", lambda *_: pytest.fail("read again"))
    before = client.get_deployment("linear")
    assert client.update_deployment("linear", "models:/linear/1") == before


def test_ranges_of_a_graph_are_said_where_it_is_deployed(client, tmp_path):
    (tmp_path / "graphs").mkdir()
    onnx.save(graph(), tmp_path / "graphs" / "linear.onnx")
    uri = log_folder(tmp_path / "graphs", "files")  # no MLmodel
    config = {**SAVED, "shapes": '{"batch": [1, 2, 100]}'}
    assert client.create_deployment("linear", uri, config=config)["version"] == 1
    assert int(client._client.config("linear.v1")["max_batch_size"]) == 100
    many = np.ones((100, 4), np.float32)
    assert client.predict("linear", {"x": many})["predictions"]["y"].shape == (100, 3)
    with pytest.raises(MlflowException, match="shapes names the dimension 'rows'"):
        client.update_deployment("linear", uri, config={"shapes": {"rows": [1, 2]}})
    with pytest.raises(MlflowException, match="'shapes' is a mapping from dimension to range"):
        client.update_deployment("linear", uri, config={"shapes": "1,2"})
    assert client.get_deployment("linear")["ready"]


def test_an_example_that_was_logged_is_what_the_graph_is_tried_with(client):
    """Ids of an embedding of ten rows, behind a subtraction that hides whose ids they are."""
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    made = helper.make_graph(
        [helper.make_node("Sub", ["ids", "hundred"], ["row"]), helper.make_node("Gather", ["table", "row"], ["y"])],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(100), "hundred")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    example = {"ids": np.array([100, 103, 109])}
    mlflow.onnx.log_model(model, name="lookup", registered_model_name="lookup", input_example=example)
    client.create_deployment("lookup", "models:/lookup/1", config=SAVED)
    np.testing.assert_allclose(client.predict("lookup", {"ids": [102]})["predictions"]["y"], table[[2]])


def test_a_triton_model_is_deployed_as_it_is(client, running, tmp_path):
    ready(tmp_path / "one" / "shout", "!")
    ready(tmp_path / "two" / "shout", "!!")
    uri = log_folder(tmp_path / "one", "triton")
    made = client.create_deployment("shout", uri, flavor="triton", config=SAVED)
    assert (made["flavor"], made["version"], made["variant"], made["ready"]) == ("triton", 1, "triton", True)
    answers = client.predict("shout", {"TEXT": [["hé"], ["b"]]})["predictions"]["LOUD"]
    assert answers.ravel()[1] == b"B!?"
    assert (running[1] / "shout.v1" / "1" / "assets").is_dir()
    assert "old" not in [path.read_text() for path in (running[1] / "shout.v1").rglob("mark.txt")]
    assert client.update_deployment("shout", uri)["version"] == 1  # the same files: nothing to do
    updated = client.update_deployment("shout", str(tmp_path / "two"))
    assert (updated["version"], updated["previous"]) == (2, [1])
    assert client.predict("shout", {"TEXT": [["b"]]})["predictions"]["LOUD"].ravel()[0] == b"B!!?"
    assert client.predict("shout", ["b"])["predictions"]["LOUD"].ravel()[0] == b"B!!?"
    assert client.rollback_deployment("shout")["version"] == 1
    assert client.predict("shout", {"TEXT": [["b"]]})["predictions"]["LOUD"].ravel()[0] == b"B!?"


def test_the_plugin_of_nvidia_logs_a_folder_beside_an_mlmodel(client, tmp_path):
    ready(tmp_path / "model" / "shout")
    (tmp_path / "model" / "MLmodel").write_text("flavors:\n  triton:\n    data: shout\nrun_id: a\n")
    assert client.create_deployment("shout", str(tmp_path / "model"), config=SAVED)["flavor"] == "triton"


def test_switching_between_triton_models_loses_no_request(client, tmp_path):
    one, two = ready(tmp_path / "one", "!"), ready(tmp_path / "two", "!!")
    client.create_deployment("shout", str(one), config=SAVED)
    stop, seen, failed = threading.Event(), set(), []

    def ask():
        while not stop.is_set():
            try:
                seen.add(client._client.infer("shout", {"TEXT": np.array([[b"a"]], object)})["LOUD"].ravel()[0])
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for folder in (two, one, two):
            client.update_deployment("shout", str(folder))
        client.rollback_deployment("shout")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert seen == {b"A!?", b"A!!?"}


def test_a_bundle_may_follow_a_triton_model_and_the_other_way_round(client, tmp_path):
    onnx.save(graph(), tmp_path / "linear.onnx")
    folder = ready(tmp_path / "shout")
    client.create_deployment("m", str(folder), config=SAVED)
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    shutil.copy(tmp_path / "linear.onnx", graphs)
    assert client.update_deployment("m", str(graphs))["flavor"] == "onnx"
    np.testing.assert_allclose(client.predict("m", X)["predictions"]["y"], X @ WEIGHTS, rtol=1e-5)
    assert client.rollback_deployment("m")["flavor"] == "triton"
    assert client.predict("m", ["b"])["predictions"]["LOUD"].ravel()[0] == b"B!?"


def test_what_cannot_be_deployed_says_why_and_leaves_nothing(client, running, tmp_path):
    two = tmp_path / "two"
    for name in ("a", "b"):
        ready(two / name)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("nothing")
    sklearn = tmp_path / "sklearn"
    sklearn.mkdir()
    (sklearn / "MLmodel").write_text("flavors:\n  sklearn: {}\n  python_function: {}\n")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "MLmodel").write_text("flavors:\n  tdeploy: {}\n")
    silent = ready(tmp_path / "silent", config='backend: "python"\n')
    broken = ready(tmp_path / "broken", config="input {")
    fails = ready(tmp_path / "fails")
    (fails / "3" / "model.py").write_text("raise ValueError('not today')")
    linked = ready(tmp_path / "linked")
    (linked / "3" / "link.txt").symlink_to("/etc/hostname")
    for path, given, why in (
        (two, {}, "holds the Triton models a, b"),
        (empty, {}, "holds no bundle, no ONNX model and no Triton model. It has no MLmodel"),
        (empty, {"flavor": "onnx"}, "there should be one graph, and there is none"),
        (empty, {"flavor": "triton"}, "holds no Triton model"),
        (sklearn, {}, "It was logged with the flavors python_function, sklearn"),
        (silent, {}, "does not say inputs and outputs"),
        (broken, {}, "This is no configuration of Triton"),
        (fails, {}, "not today"),
        (linked, {}, "is a link"),
        (ready(tmp_path / "good"), {"config": {"instances": 2}}, "leave options of serving out"),
        (tmp_path / "good", {"config": {"shapes": {"batch": [1, 2]}}}, "shapes is for plain ONNX graphs"),
        (tmp_path / "good", {"flavor": "tdeploy"}, "No bundle at"),
        (lost, {}, "No bundle at"),
    ):
        with pytest.raises(MlflowException, match=why):
            client.create_deployment("m", str(path), **given)
        assert not list(running[1].iterdir()), path


def test_tables_of_columns_reach_a_graph(client, tmp_path):
    onnx.save(graph(), tmp_path / "linear.onnx")
    client.create_deployment("linear", str(tmp_path), config=SAVED)
    table = pd.DataFrame({"x": [row.tolist() for row in X]})
    np.testing.assert_allclose(client.predict("linear", table)["predictions"]["y"], X @ WEIGHTS, rtol=1e-5)


def test_an_input_and_an_output_of_one_name_are_refused(client, tmp_path):
    """An ensemble cannot have both: it would be loaded, and never answer."""
    client.create_deployment("m", str(ready(tmp_path / "good")), config=SAVED)
    config = SHOUT_CONFIG.replace('"LOUD"', '"TEXT"')
    with pytest.raises(MlflowException, match="takes and answers 'TEXT' under one name"):
        client.update_deployment("m", str(ready(tmp_path / "same", config=config)))
    assert client.predict("m", ["b"])["predictions"]["LOUD"].ravel()[0] == b"B!?"


@pytest.mark.parametrize("kind", ["onnx", "triton"])
def test_what_a_remote_store_has_now_is_what_is_deployed(client, tmp_path, monkeypatch, kind):
    """Files of the same size may be logged again to the same place; a store does not say when."""
    monkeypatch.setattr("mlflow_tdeploy.registry_io.location.Location.local", None)
    folder = tmp_path / "files"
    folder.mkdir()
    answers = []
    for value in (1.0, 2.0):
        if kind == "onnx":
            onnx.save(graph(value), folder / "linear.onnx")
        else:
            shutil.rmtree(folder)
            ready(folder, mark=str(value))
        if not answers:
            client.create_deployment("m", folder.as_uri(), config=SAVED)
        else:
            client.update_deployment("m", folder.as_uri())
        (answer,) = client.predict("m", X if kind == "onnx" else ["b"])["predictions"].values()
        answers.append(answer.ravel()[0])
    assert answers[0] != answers[1]
    before = client.get_deployment("m")
    assert client.update_deployment("m", folder.as_uri()) == before  # nothing is new


def test_a_number_without_an_axis_is_refused_before_anything_is_sent(client, running, tmp_path):
    made = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "sum.onnx")
    with pytest.raises(MlflowException, match="'y' is a single number of a whole request"):
        client.create_deployment("m", str(tmp_path))
    assert not list(running[1].iterdir())


def test_settings_that_mean_nothing_to_the_next_flavor_are_left_out(client, tmp_path):
    (tmp_path / "graphs").mkdir()
    onnx.save(graph(), tmp_path / "graphs" / "linear.onnx")
    config = {**SAVED, "shapes": {"batch": [1, 2, 100]}, "instances": 2}
    client.create_deployment("m", str(tmp_path / "graphs"), config=config)
    shout = ready(tmp_path / "shout")
    assert client.update_deployment("m", str(shout))["flavor"] == "triton"
    assert client.update_deployment("m", str(tmp_path / "graphs"))["config"]["shapes"] == {"batch": [1, 2, 100]}
    assert int(client._client.config("m.v3")["max_batch_size"]) == 100
    with pytest.raises(MlflowException, match="leave options of serving out"):
        client.update_deployment("m", str(shout), config={"instances": 3})


def test_texts_come_and_go_as_mlflows_command_line_reads_and_writes_them(client, tmp_path):
    client.create_deployment("m", str(ready(tmp_path / "shout")), config=SAVED)
    for asked in (pd.DataFrame(["a", "é"]), pd.DataFrame({"TEXT": ["a", "é"]}), ["a", "é"]):
        assert client.predict("m", asked).to_json() == '{"predictions": {"LOUD": [["A!?"], ["\\u00e9!?"]]}}'


def test_a_table_of_numbers_is_the_only_input_of_a_graph(client, tmp_path):
    table = pd.DataFrame(X, columns=list("abcd"))
    mlflow.onnx.log_model(graph(), name="linear", registered_model_name="linear", input_example=table)
    client.create_deployment("linear", "models:/linear/1", config=SAVED)
    for asked in (table, pd.DataFrame(X.tolist())):
        answer = client.predict("linear", asked)["predictions"]["y"]
        np.testing.assert_allclose(answer, X @ WEIGHTS, rtol=1e-5)


def test_inputs_whose_names_differ_in_signs_only_are_warmed_up_each(client, tmp_path):
    made = helper.make_graph(
        [helper.make_node("Cast", ["x_1"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["x.1", "f"], ["y"])],
        "two",
        [
            helper.make_tensor_value_info("x.1", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("x_1", TensorProto.INT64, ["n", 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "two.onnx")
    client.create_deployment("m", str(tmp_path), config=SAVED)
    asked = {"x.1": X, "x_1": np.array([[2], [3]])}
    np.testing.assert_allclose(client.predict("m", asked)["predictions"]["y"], X * [[2], [3]])


def centered() -> onnx.ModelProto:
    """Return x less the mean of its rows: what a row is told depends on all of its request."""
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        onnx.helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    made = onnx.helper.make_graph(nodes, "centered", values[:1], values[1:])
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_requests_whose_rows_depend_on_each_other_are_answered_apart(client):
    uri = mlflow.onnx.log_model(centered(), name="centered").model_uri
    client.create_deployment("centered", uri, config={"grace": 0, "max_queue_delay_microseconds": 0})
    assert int(client._client.config("centered.v1").get("max_batch_size", 0)) == 0
    wrong = []

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(25):
            x = random.standard_normal((3, 4)).astype(np.float32) + seed
            y = client.predict("centered", {"x": x})["predictions"]["y"]
            wrong.extend([] if np.allclose(y, x - x.mean(0), atol=1e-5) else [seed])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_fewer_rows_at_once_than_a_golden_request_has(client, most):
    """Golden requests of a graph have up to 8 rows: they warm it up and verify it in parts."""
    uri = mlflow.onnx.log_model(graph(), name="graph").model_uri
    client.create_deployment("linear", uri, config={"grace": 0, "max_batch_size": most})
    assert int(client._client.config("linear.v1")["max_batch_size"]) == most
    x = np.ones((most, 4), np.float32)
    assert client.predict("linear", {"x": x})["predictions"]["y"].shape[0] == most
    with pytest.raises(MlflowException, match=rf"outside its range 1\.\.{most}"):
        client.predict("linear", {"x": np.ones((most + 1, 4), np.float32)})


def test_joining_requests_may_be_switched_off(client):
    uri = mlflow.onnx.log_model(graph(), name="graph").model_uri
    client.create_deployment("linear", uri, config={"grace": 0, "batching": False})
    assert int(client._client.config("linear.v1").get("max_batch_size", 0)) == 0
    x = np.ones((9, 4), np.float32)
    assert client.predict("linear", {"x": x})["predictions"]["y"].shape[0] == 9


@pytest.mark.slow
def test_ranges_of_another_graph_are_left_out_unless_they_are_said_now(client, caplog):
    linear = mlflow.onnx.log_model(graph(), name="graph").model_uri
    shapes = {"batch": [1, 4, 100]}
    client.create_deployment("m", linear, config={**SAVED, "shapes": shapes})
    other = graph(2.0)
    for value in (*other.graph.input, *other.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    other = mlflow.onnx.log_model(other, name="other").model_uri
    assert client.update_deployment("m", other)["version"] == 2
    assert int(client._client.config("m.v2")["max_batch_size"]) == 512
    with pytest.raises(MlflowException, match="shapes names .*'batch', which this"):
        client.update_deployment("m", other, config={"shapes": shapes})


def test_a_configuration_beside_a_plain_graph_is_told_not_to_be_used(client, tmp_path, caplog):
    onnx.save(graph(), tmp_path / "model.onnx")
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 3\n")
    client.create_deployment("m", str(tmp_path), flavor="onnx", config=SAVED)
    assert "config.pbtxt beside the graph is not used" in caplog.text


def test_the_version_that_a_policy_names_is_the_one_and_other_folders_are_none(client, tmp_path):
    folder = ready(tmp_path / "shout", config=SHOUT_CONFIG + "version_policy { specific { versions: [2] } }\n")
    (folder / "library" / "2024").mkdir(parents=True)
    (folder / "library" / "2024" / "notes.txt").write_text("no version")
    client.create_deployment("shout", str(folder), config=SAVED)
    answer = client.predict("shout", {"TEXT": [["a"]]})["predictions"]
    assert b"old" in answer["LOUD"].ravel()[0]


def test_a_triton_model_without_its_file_is_refused_before_a_server_waits_for_it(client, running, tmp_path):
    folder = ready(tmp_path / "shout")
    (folder / "3" / "model.py").unlink()
    with pytest.raises(MlflowException, match=r"has no 'model\.py' in version 3"):
        client.create_deployment("shout", str(folder), config=SAVED)
    assert not [path for path in running[1].iterdir() if path.is_dir()]


def test_an_example_of_many_rows_is_tried_as_far_as_the_graph_goes(client, caplog):
    example = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    uri = mlflow.onnx.log_model(graph(), name="graph", input_example={"x": example}).model_uri
    client.create_deployment("m", uri, config=SAVED)
    assert "without the example" not in caplog.text


def test_arrays_are_sent_as_they_are(client):
    client.create_deployment("m", mlflow.onnx.log_model(graph(), name="graph").model_uri, config=SAVED)
    with pytest.raises(MlflowException, match=r"'x' is empty \(shape \(0, 4\)\)"):
        client.predict("m", {"x": np.zeros((0, 4), np.float32)})
    with pytest.raises(MlflowException, match="does not fit|cannot be made"):
        client.predict("m", {"x": np.array([["a", "b", "c", "d"]], object)})
