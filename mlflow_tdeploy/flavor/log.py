"""``log_model``: save, upload, register, and make variants and evidence searchable."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model as MlflowModel
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

from mlflow_tdeploy import FLAVOR_NAME
from mlflow_tdeploy.core.errors import InvalidInputError, StorageError
from mlflow_tdeploy.flavor.package import Packaging
from mlflow_tdeploy.flavor.save import write_model
from mlflow_tdeploy.flavor.source import BundleRequest, OnBudget, Prepared, Progress
from mlflow_tdeploy.registry_io import describe, mlflow_errors, searches, tag_logged_model
from mlflow_tdeploy.registry_io.searches import Search
from mlflow_tdeploy.store.disk import is_full

if TYPE_CHECKING:
    from mlflow_tdeploy.build.engine_options import Engine
    from mlflow_tdeploy.build.options import Precisions

_log = logging.getLogger("mlflow_tdeploy")


def log_model(
    model: Any,
    name: str | None = None,
    *,
    artifact_path: str | None = None,
    task: str | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    shapes: Mapping[str, Any] | None = None,
    example: Any = None,
    labels: Any = None,
    precisions: Precisions | None = None,
    engines: Iterable[str | Engine] | None = None,
    budget: Any = None,
    on_budget: OnBudget = "drop",
    verify_with: Any = None,
    calibrate_with: Any = None,
    search_seconds: float | None = None,
    search_trials: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    opset: int = 18,
    progress: Progress | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = None,
    conda_env: Any = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    code_paths: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    model_config: Mapping[str, Any] | str | None = None,
    registered_model_name: str | None = None,
    await_registration_for: int | None = 300,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
    validate_serving_input: bool = True,
    prompts: list[Any] | None = None,
) -> ModelInfo:
    """Log a model with its verified variants to MLflow.

    Variants become tags and their evidence becomes metrics of the logged model, so ``mlflow.search_logged_models``
    finds for example every int8 variant that is close enough::

        mlflow.search_logged_models(
            filter_string="tags.`tdeploy.variant.ort-cpu-int8` = 'ok' AND metrics.`ort-cpu-int8.worst_cosine` > 0.99"
        )

    The tag says what the newest verdict is; a metric also matches by values it had before a later verdict.

    Of several threads of a process, one after the other reads its model and builds: processes do so side by side.

    Args:
        model: What to log; see :func:`save_model`, also for every parameter that is not listed here.
        name: Name of the logged model.
        artifact_path: Deprecated: use ``name``.
        task: See :func:`save_model`.
        tokenizer: See :func:`save_model`.
        image_processor: See :func:`save_model`.
        shapes: See :func:`save_model`.
        example: See :func:`save_model`.
        labels: See :func:`save_model`.
        precisions: See :func:`save_model`.
        engines: See :func:`save_model`.
        budget: See :func:`save_model`.
        on_budget: See :func:`save_model`.
        verify_with: See :func:`save_model`.
        calibrate_with: See :func:`save_model`.
        search_seconds: See :func:`save_model`.
        search_trials: See :func:`save_model`.
        revision: See :func:`save_model`.
        token: See :func:`save_model`.
        trust_remote_code: See :func:`save_model`.
        opset: See :func:`save_model`.
        progress: See :func:`save_model`.
        signature: See :func:`save_model`.
        input_example: See :func:`save_model`.
        conda_env: See :func:`save_model`.
        pip_requirements: See :func:`save_model`.
        extra_pip_requirements: See :func:`save_model`.
        code_paths: See :func:`save_model`.
        metadata: See :func:`save_model`.
        extra_files: See :func:`save_model`.
        model_config: See :func:`save_model`.
        registered_model_name: Also register a version under this name.
        await_registration_for: Seconds to wait for the version; 0 or None to not wait.
        params: Parameters of the logged model.
        tags: Tags of the logged model.
        model_type: Type of the logged model.
        step: Step of the run that the model belongs to.
        model_id: Log into this logged model instead of a new one.
        validate_serving_input: Whether the input example is tried on the saved model.
        prompts: Prompts to link with the model.

    Returns:
        MLflow's description of the logged model.

    Raises:
        MlflowException: Anything about the model or the parameters; the logged model is marked as failed then.
    """
    with mlflow_errors():  # whatever can be refused is refused before MLflow creates a logged model
        request = BundleRequest(
            task, tokenizer, shapes, example, labels, precisions, engines, budget, on_budget, verify_with, revision,
            token, trust_remote_code, opset, progress, calibrate_with, search_seconds, search_trials,
        image_processor,
        )  # fmt: skip
        packaging = Packaging(
            signature, input_example, conda_env, pip_requirements, extra_pip_requirements, code_paths, metadata,
            extra_files, model_config,
        )  # fmt: skip
        request.check()
        packaging.check()
        _validate_logged_model_name(name)
        if registered_model_name is not None:
            _validate_model_name(registered_model_name)
        step = _whole(step)
        if not all(isinstance(one, Mapping) for one in (params, tags) if one is not None):
            raise InvalidInputError("params and tags are mappings from name to value.")
        prepared = request.prepare(model)
    saver = _Saver(prepared, request, packaging)
    with prepared, saver.published():
        return MlflowModel.log(
            artifact_path=artifact_path,
            name=name,
            flavor=saver,
            flavor_name=FLAVOR_NAME,
            registered_model_name=registered_model_name,
            await_registration_for=await_registration_for,
            metadata=metadata,
            params=params,
            tags=tags,
            model_type=model_type,
            step=step,
            model_id=model_id,
            prompts=prompts,
            model_config=model_config,
            validate_serving_input=validate_serving_input,
        )


def _whole(step: Any) -> int:
    """Return a step as a number, those of numpy included."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise InvalidInputError(f"step is a whole number, got {step!r}.")
    return operator.index(step)


class _Saver:
    """What ``Model.log`` calls a flavor; keeps what the bundle says, as MLflow removes its folder at once."""

    def __init__(self, prepared: Prepared, request: BundleRequest, packaging: Packaging) -> None:
        self._prepared = prepared
        self._request = request
        self._packaging = packaging
        self._model_id: str | None = None
        self._description: tuple[dict[str, str], dict[str, float], tuple[Search, ...]] = ({}, {}, ())

    def save_model(self, path: str, mlflow_model: MlflowModel, **_: Any) -> None:
        self._model_id = mlflow_model.model_id
        bundle = write_model(self._prepared, Path(path), self._request, self._packaging, mlflow_model)
        self._description = (*describe(bundle), searches(bundle))

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        """Write tags and metrics in the end, also of a model that was logged and could not be registered."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):  # the error that counts is on its way
                self._settle()
            if isinstance(error, OSError) and is_full(error):
                raise self._no_room(error) from error
            raise
        self._publish()

    def _settle(self) -> None:
        """Leave no logged model that seems to be under way: MLflow marks one as failed, unless it is interrupted."""
        if self._model_id is None:
            return
        status = MlflowClient().get_logged_model(self._model_id).status
        if status == LoggedModelStatus.READY:
            self._publish()
        elif status == LoggedModelStatus.PENDING:
            MlflowClient().finalize_logged_model(self._model_id, LoggedModelStatus.FAILED)

    def _no_room(self, error: OSError) -> MlflowException:
        left = (
            f" What was written of the logged model '{self._model_id}', which is marked as failed, stays in the store."
        )
        return MlflowException(
            f"The disk is full ({error.filename or error}): the model was not logged.{left if self._model_id else ''} "
            f"Free some space and log it again.",
            error_code=ErrorCode.Value(StorageError.code),
        )

    def _publish(self) -> None:
        """Write tags and metrics; the model is whole without them, so a failure here is a warning."""
        try:
            tag_logged_model(self._model_id or "", *self._description)
        except Exception as error:
            _log.warning(
                "The model %s was logged, but not its tags and metrics (search_logged_models will not find its "
                "variants): %s",
                self._model_id,
                error,
            )
