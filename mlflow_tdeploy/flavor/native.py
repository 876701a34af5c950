"""What ``load_model`` returns: an opened bundle whose errors are MLflow's."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.registry_io import mlflow_errors
from mlflow_tdeploy.runtime.decision import Decision
from mlflow_tdeploy.runtime.model import Model
from mlflow_tdeploy.store.bundle import Bundle


class TDeployModel:
    """A model served by the variant its host chose. Safe to use from several threads; close it or use ``with``."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def predict(self, inputs: Any, params: Mapping[str, Any] | None = None, **keywords: Any) -> Any:
        """Answer a request.

        Args:
            inputs: Texts (string, list, array, Series, table with one column or one called ``text``) or, for the task
                ``tensors``, a mapping from name to array.
            params: The task's parameters; ``variant`` and ``runtime`` force another variant for this call,
                ``strict`` refuses to answer with any but the first choice.
            **keywords: More parameters, by name.

        Returns:
            What the task returns, in the order of the inputs: an array of vectors, a list of records
            ``{"label": …, "score": …}``, a list of arrays, or a mapping from name to array.

        Raises:
            MlflowException: The inputs or parameters cannot be used (INVALID_PARAMETER_VALUE), or the forced variant
                cannot serve.
        """
        with mlflow_errors():
            return self._model.predict(inputs, params, **keywords)

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph on arrays, without the task's own preparation.

        Args:
            feeds: Name → array, of the signature's dtypes and shapes; their values are the caller's business. Or
                torch tensors of one device, which a TensorRT engine takes where they are.

        Returns:
            Name → array, or tensor on that device.

        Raises:
            MlflowException: A tensor is missing, unknown, of a wrong dtype or out of its range.
        """
        with mlflow_errors():
            return self._model.infer(feeds)

    @property
    def signature(self) -> Signature:
        """Tensors and ranges of the graph."""
        return self._model.signature

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Every variant by id."""
        return self._model.variants

    @property
    def decision(self) -> Decision:
        """Which variant serves and why each other one does not."""
        with mlflow_errors():
            return self._model.decision

    @property
    def task(self) -> Task:
        """The model's task."""
        return self._model.task

    @property
    def bundle(self) -> Bundle:
        """The records this model was opened from."""
        return self._model.bundle

    def close(self) -> None:
        """Free sessions and threads; closing twice is fine."""
        self._model.close()

    def __enter__(self) -> TDeployModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
