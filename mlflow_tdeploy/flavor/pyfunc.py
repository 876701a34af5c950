"""The model behind ``mlflow.pyfunc.load_model`` and MLflow's scoring server."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mlflow_tdeploy.flavor.config import known_only, said_now, split_config
from mlflow_tdeploy.flavor.origin import origin_fetch
from mlflow_tdeploy.registry_io import mlflow_errors
from mlflow_tdeploy.runtime.model import Model, open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle


class PyFuncWrapper:
    """Answers in the forms that MLflow expects. Called from several threads at once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._form = model.task.answer_form()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Answer a request.

        Args:
            model_input: Texts, or what else the task's columns say (a table, records, list, Series, array), or tensors
                by name.
            params: The task's parameters, ``variant`` and ``runtime`` to force another one for this call, and
                ``strict`` to have no answer from any but the first choice.

        Returns:
            Sentence embeddings as a float array; labels, or answers, as a table with a column for each of their fields
            (lists of records where several are asked for); lists of entities, fillings or documents; hidden states as
            nested lists; tensors by name. None, or a row of None, for what ``errors="null"`` leaves out.
        """
        with mlflow_errors():
            return self._shape(self._model.predict(model_input, params), getattr(model_input, "index", None))

    def _shape(self, answer: Any, index: Any) -> Any:
        if self._form.kind == "nested":
            return [None if array is None else array.tolist() for array in answer]
        if self._form.kind == "records" and all(one is None or isinstance(one, Mapping) for one in answer):
            import pandas as pd

            # the caller's own rows: put beside its table, an answer must not land on another one
            kept = index if isinstance(index, pd.Index) and len(index) == len(answer) else None
            fields = [field.name for field in self._form.fields]
            if not any(one is None for one in answer):
                return pd.DataFrame(answer, columns=fields, index=kept)
            # of objects: a column of numbers has NaN where one is missing, which is no JSON
            rows = [[None if one is None else one[name] for name in fields] for one in answer]
            return pd.DataFrame(rows, columns=fields, index=kept, dtype=object)
        return answer

    def get_raw_model(self) -> Model:
        """Return the opened model, with its decision, variants and signature."""
        return self._model


# MLflow asks for this signature at every request; one at hand is found sooner than worked out anew.
PyFuncWrapper.predict.__signature__ = inspect.signature(PyFuncWrapper.predict)  # type: ignore[attr-defined]


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> PyFuncWrapper:
    """Load a model for ``mlflow.pyfunc``; called by MLflow with the bundle's folder."""
    with mlflow_errors():
        bundle = Bundle.open(path)
        config = known_only(model_config)
        _, options = split_config(config)
        policy = Policy.of(said_now(bundle, config), saved=config, saved_as="in model_config")
        return PyFuncWrapper(open_model(path, policy=policy, options=options, fetch=origin_fetch(bundle)))
