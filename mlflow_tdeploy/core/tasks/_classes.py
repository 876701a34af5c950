"""What all classifiers share: names of classes, scores from logits, and how good they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlflow_tdeploy.core.budget import SPREAD, VECTOR_BUDGET, Budget, Limit
from mlflow_tdeploy.core.compare import REFERENCE_NON_FINITE, Comparison, Rows
from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError, shown
from mlflow_tdeploy.core.quality import CLASSIFIED, classified, log_loss
from mlflow_tdeploy.core.spread import Spread
from mlflow_tdeploy.core.tasks._base import Task
from mlflow_tdeploy.core.tasks._forms import Param
from mlflow_tdeploy.core.tensors import Array, Arrays, Signature

OUTPUT = "logits"
FUNCTIONS = ("softmax", "sigmoid", "none")
FUNCTION = Param("function_to_apply", "string", "", "softmax, sigmoid or none; empty for the model's own.")
#: A difference of this share of the usual best score matters to nobody.
_MATTERS = 0.01
#: For regression: as for vectors, and within a tenth of what tells one item from another.
RAW_BUDGET = VECTOR_BUDGET.tightened(Budget((Limit(SPREAD.metric, "<=", 0.1),)))


class Classifier(Task):
    """A task whose graph returns a logit for each class; its settings have ``labels`` and ``function_to_apply``."""

    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.02), SPREAD))
    quality: ClassVar[tuple[str, ...]] = CLASSIFIED

    def __init__(self, config: Mapping[str, Any], signature: Signature, assets: Path) -> None:
        super().__init__(config, signature, assets)
        self._labels, self._function = list(self.config.labels), self.config.function_to_apply
        check_classes(self.name, self._labels, signature)

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return labels in class order and what the pipeline applies to the logits.

        Raises:
            InvalidInputError: There are more or fewer labels than classes.
        """
        names = class_names(config, width, labels)
        problem, asked = config.get("problem_type"), pipeline.get("function_to_apply")
        if problem == "regression":
            usual = "none"
        elif problem == "multi_label_classification" or width == 1:
            usual = "sigmoid"
        else:
            usual = "softmax"
        function = usual if asked is None else str(getattr(asked, "name", asked)).lower()  # an enumeration, or text
        return {"labels": names, "function_to_apply": function}

    @property
    def scored(self) -> Mapping[str, Any]:
        """Parameters that ask for all scores: the loss needs those."""
        return {"top_k": 0}

    @property
    def quality_of_scores(self) -> tuple[str, ...]:
        """The loss, where scores are probabilities of one class among all."""
        return ("loss",) if self._function == "softmax" else ()

    def usual_budget(self) -> Budget:
        """Return one without a limit on scores where these are the model's own numbers, of whatever scale."""
        return RAW_BUDGET if self._function == "none" else self.default_budget

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``top_k`` and ``function_to_apply``."""
        checked = super().check_params(params)
        if checked["top_k"] < 0:
            raise InvalidInputError(f"top_k must be at least 1, or 0 for all labels, got {shown(checked['top_k'])}.")
        checked["function_to_apply"] = checked["function_to_apply"] or self._function
        if checked["function_to_apply"] not in FUNCTIONS:
            raise InvalidInputError(
                f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {shown(checked['function_to_apply'])}."
            )
        return checked

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the best labels of each row, each with its score."""
        scores = apply_function(outputs[OUTPUT][:count], params["function_to_apply"])
        keep = params["top_k"] or scores.shape[1]
        if keep == 1 and not np.isnan(scores).any():  # the first of several that are best, as below
            best = scores.argmax(axis=1)[:, None]
        else:
            best = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        return [
            [{"label": self._labels[index], "score": float(row[index])} for index in order]
            for row, order in zip(scores, best.tolist(), strict=True)
        ]

    def comparison(self) -> Comparison:
        """Compare scores class by class, and whether the best label is the same."""
        return ScoreComparison(self._function)

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return accuracy, macro precision, recall and F1; of all probabilities the loss (cross entropy), too.

        Args:
            answers: A record, or a list of them, best first, for each item.
            labels: Names or class indices.
        """
        names = self._class_names(labels)
        ranked = [answer if isinstance(answer, list) else [answer] for answer in answers]
        found = classified([one[0]["label"] for one in ranked], names)
        if self._function == "softmax" and all(len(one) == len(self._labels) for one in ranked):
            given = ({one["label"]: one["score"] for one in answer} for answer in ranked)
            found["loss"] = log_loss([scores[name] for scores, name in zip(given, names, strict=True)])
        return found

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that each label is one of the model's names or a class index."""
        self._class_names(labels)

    def _class_names(self, labels: Sequence[Any]) -> list[str]:
        """Return the labels' names. Whole numbers that are all names ("1" to "5") are names, otherwise indices."""
        plain = [_plain(label) for label in labels]
        by_name = all(str(label) in self._labels for label in plain if isinstance(label, int))
        names = []
        for index, label in enumerate(plain):
            is_index = isinstance(label, int) and not by_name
            if not (0 <= label < len(self._labels) if is_index else str(label) in self._labels):
                known = ", ".join(self._labels[:8]) + (", …" if len(self._labels) > 8 else "")
                raise InvalidInputError(
                    f"The label {index} ({shown(labels[index])}) is no label of the model: {known}."
                )
            names.append(self._labels[label] if is_index else str(label))
        return names


def _plain(label: Any) -> Any:
    """Return numpy's whole numbers, and floats that are whole (a column with gaps has such), as int."""
    if isinstance(label, (int, np.integer)) or (isinstance(label, (float, np.floating)) and float(label).is_integer()):
        return int(label)
    return label


def check_classes(task: str, labels: Sequence[str], signature: Signature) -> None:
    """Make sure that a graph returns as many classes as there are labels.

    Raises:
        ManifestError: It does not.
    """
    classes = next((spec.shape[-1] for spec in signature.outputs if spec.name == OUTPUT), None)
    if not labels or (isinstance(classes, int) and classes != len(labels)):
        raise ManifestError(
            f"task_config of '{task}': {len(labels)} labels for a graph that returns {classes} classes."
        )


def class_names(config: Mapping[str, Any], width: int, labels: Sequence[str] | None) -> list[str]:
    """Return the names of a model's classes: those that are given, else those of its config.

    Raises:
        InvalidInputError: There are more or fewer than classes, or two of them are called alike.
    """
    named = {str(index): name for index, name in (config.get("id2label") or {}).items()}
    names = list(labels) if labels is not None else [str(named.get(str(i), f"LABEL_{i}")) for i in range(width)]
    if len(names) != width:
        raise InvalidInputError(f"labels has {len(names)} names, the model has {width} classes.")
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise InvalidInputError(
            f"The model calls several classes {shown(twice[0])}, so that no answer would tell which is meant. Log it "
            f"with labels=[…], a name of its own for each of its {width} classes."
        )
    return names


class ScoreComparison(Comparison):
    """Scores class by class, and whether the best class is the same.

    Args:
        function: From logits to scores, see :func:`apply_function`.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._rows = Rows()
        self._scores, self._top = Spread(), 0.0
        self._worst = 0.0
        self._agree = 0
        self._count = 0
        self._broken = 0

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        """Take in logits (rows, classes)."""
        ref, new = reference[OUTPUT].astype(np.float64), got[OUTPUT].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # logits may be anything
            wanted, scores = apply_function(ref, self._function), apply_function(new, self._function)
        usable = np.isfinite(wanted).all(axis=1)  # one NaN would hide every other row: no maximum is larger
        self._broken += int((~usable).sum())
        if not usable.any():
            return
        ref, new, wanted, scores = ref[usable], new[usable], wanted[usable], scores[usable]
        self._rows.add(ref, new)
        lost = np.asarray(~np.isfinite(scores).all(axis=1))  # no scores at all: as far off as can be
        scores = np.where(lost[:, None], 0.0, scores)
        self._scores.add(wanted, scores)
        self._top += float(np.abs(wanted).max(axis=1).sum())
        difference = np.abs(wanted - scores)
        difference[lost] = np.maximum(difference[lost], 1.0)
        self._worst = max(self._worst, float(difference.max()))
        self._agree += int(((ref.argmax(axis=1) == new.argmax(axis=1)) & ~lost).sum())
        self._count += len(wanted)

    def metrics(self) -> dict[str, float]:
        """Return how far logits and scores are off."""
        rows = self._rows.metrics()
        if broken := self._broken + rows.get(REFERENCE_NON_FINITE, 0.0):
            rows[REFERENCE_NON_FINITE] = broken
        agreement = self._agree / self._count if self._count else 1.0
        # of the scores that users see: what tells apart those of a thousand classes is small beside those of two
        usual = _MATTERS * self._top / self._count if self._count else 0.0
        rows[SPREAD.metric] = self._scores.error(usual)
        return {**rows, "max_score_difference": self._worst, "label_agreement": agreement}


def apply_function(logits: Array, function: str) -> Array:
    """Turn logits (…, classes) into scores in float64-safe arithmetic."""
    if function == "none":
        return logits
    values = logits.astype(np.float64)
    if function == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-values)))
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))
