"""Graphs that a search tries: bounds, figures that are no numbers, and what is left where nothing is found."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.runtime import probe


class Told:
    """A judge that is told what it says."""

    budget = Budget.of("worst_cosine >= 0.9, exact_share >= 0.5")

    def __init__(self, distances):
        self._distances = distances

    def distance(self, graph):
        return self._distances[graph]

    def verdict(self, graph):
        metrics = {"worst_cosine": 0.8, "exact_share": 0.4, "max_part_error": 0.1}
        return SimpleNamespace(passed=False, metrics=metrics, seconds=1.0, violations=("exact_share 0.4 < 0.5",))


def trials(distances, **bounds):
    context = SimpleNamespace(
        started=0.0, search_seconds=math.inf, search_trials=math.inf, tried=lambda what, seconds: None
    )
    return Trials(SimpleNamespace(**{**vars(context), **bounds}), Told(distances), lambda key: key, str)


def test_a_graph_whose_answers_are_no_numbers_is_never_the_closest():
    of = trials({"max": math.inf, "entropy": 0.3, "mse": 0.3})
    assert of.closest({"max": "max", "entropy": "entropy", "mse": "mse"}) == "entropy"
    json.dumps(of.settings("entropy"), allow_nan=False)


def test_a_trial_tells_the_figures_that_the_budget_is_about_and_why_it_failed():
    of = trials({})
    assert not of.passes("a")
    (one,) = of.all
    assert one.record()["exact_share"] == 0.4
    assert "max_part_error" not in one.record()
    assert one.record()["violations"] == "exact_share 0.4 < 0.5"
    assert str(one) == "a: over the budget (worst_cosine 0.8, exact_share 0.4)"


def test_bounds_count_from_the_start_of_the_recipes_work_and_are_told():
    assert trials({}, started=-1e9, search_seconds=60.0).late()
    of = trials({"a": 0.1}, search_trials=1)
    assert not of.late()
    assert "cut_short" not in of.settings("a")
    of.distance("a")
    assert of.late()
    assert of.settings("a")["cut_short"] is True


def test_the_order_of_parts_leaves_something_for_what_comes_after():
    of = trials({"a": 0.1, "b": 0.2}, search_trials=3)
    of.distance("a")
    assert not of.order_known()
    of.distance("b")
    assert of.order_known()
    assert not of.late()


def test_a_search_that_was_cut_short_says_so_and_not_that_there_is_nothing(caplog):
    of = trials({"a": 0.1, "b": 0.2}, search_trials=1)
    assert of.closest({"a": "a", "b": "b"}) == "a"
    assert len(of.all) == 1
    text = str(of.nothing_within("a-recipe"))
    assert text.startswith("Nothing within the budget was found by 1 graphs, when the search was cut short")
    assert "--trials" in text
    assert str(of.nothing_within("a-recipe", "Training has moved it")).startswith("Training has moved it; of the last")
    of.settings("a")
    assert "A search was cut short after 1 graphs" in caplog.text


def test_a_trial_of_some_parts_names_them():
    of = trials({"a": 0.1, "b": 0.2, "c": 0.3})
    of.distance("a", alone=["first"])
    of.distance("b", alone=["first", "second", "third"])
    of.distance("c")
    assert [one.what for one in of.all] == ["a; only first", "b; only first to third (3)", "c"]


def test_what_found_nothing_keeps_all_that_was_tried():
    of = trials({"a": 0.1})
    of.distance("a")
    of.passes("b")
    error = of.nothing_within("a-recipe")
    assert [one["what"] for one in error.trials] == ["a", "b"]
    assert error.budget == Told.budget
    assert "exact_share 0.4 < 0.5" in str(error)
    assert "leave 'a-recipe' out" in str(error)


@pytest.fixture
def judge():
    """One that asks a sample of one batch; its answers are never looked at as a whole."""
    made = Judge(SimpleNamespace(data=SimpleNamespace(record="data"), task=None), Told.budget, (), probe.host())
    made._sample = [({"x": np.ones((1, 2), np.float32)}, {"y": np.ones((1, 2), np.float32)})]
    return made


class Session:
    def __init__(self, answer):
        self._answer = answer

    def infer(self, feeds):
        return {"y": self._answer}

    def close(self):
        pass


def test_answers_that_are_no_numbers_are_infinitely_far_off(judge, monkeypatch):
    answer = np.array([[np.nan, 1.0]], np.float32)
    monkeypatch.setattr("mlflow_tdeploy.build.judge.open_candidate", lambda *given: Session(answer))
    assert judge.distance(None) == math.inf


def test_one_graph_that_cannot_be_opened_ends_no_search(judge, tmp_path):
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    unknown = helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", sides[:1], sides[1:])
    onnx.save(helper.make_model(unknown, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    judge._answers.task = SimpleNamespace(signature=SimpleNamespace(inputs=(), outputs=(), dims=()))
    graph = Graph(tmp_path / "g.onnx", Precision())
    assert judge.distance(graph) == math.inf
    verdict = judge.verdict(graph)
    assert (verdict.passed, verdict.failed) == (False, True)
    assert verdict.violations[0].startswith("an error: ")
