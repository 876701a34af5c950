"""``save_model``: a bundle and everything MLflow wants around it, in a folder, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models import Model as MlflowModel
from mlflow.models import ModelSignature

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.flavor.package import Packaging
from mlflow_tdeploy.flavor.report_model import write_report
from mlflow_tdeploy.flavor.source import BundleRequest, OnBudget, Prepared, Progress
from mlflow_tdeploy.registry_io import mlflow_errors
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ROOT
from mlflow_tdeploy.store.pack import write_pack
from mlflow_tdeploy.store.staging import refuse_taken, staged_directory

if TYPE_CHECKING:
    from mlflow_tdeploy.build.engine_options import Engine
    from mlflow_tdeploy.build.options import Precisions


@mlflow_errors()
def save_model(
    model: Any,
    path: str | Path,
    *,
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
    mlflow_model: MlflowModel | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = None,
    conda_env: Any = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    code_paths: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    model_config: Mapping[str, Any] | str | None = None,
) -> None:
    """Save a model with its verified variants to a folder. After a failure the folder does not exist.

    Of several threads of a process, one after the other reads its model and builds: processes do so side by side.

    Args:
        model: A transformers pipeline, a ``PreTrainedModel``, a ``SentenceTransformer``, a local folder or hub id, a
            ``torch.nn.Module``, an ``onnx.ModelProto`` or its path, a mapping from variant id to ONNX graphs (and,
            beside them, folders of Triton repositories), or a folder that holds a finished bundle.
        path: Folder to write; it must not exist or be empty.
        task: Name of the task, where it cannot be told from the model.
        tokenizer: Tokenizer of a bare model.
        image_processor: Image processor of a bare model of images, or its folder.
        shapes: Range of each dimension: ``{"batch": (1, 8, 64), "sequence": (1, 128, 512)}``.
        example: Example inputs of a ``torch.nn.Module``: a mapping from parameter to array, or arrays in the order of
            its forward.
        labels: Names of the classes, where the model's own are to be replaced.
        precisions: Which variants to make, as precisions or ids; every one made by default when None. ``auto`` is the
            fastest within the budget for this kind of host, looked for some minutes. A
            :class:`~mlflow_tdeploy.FakeQuant` says how layers of the torch module are quantized, and who trains it so;
            a :class:`~mlflow_tdeploy.Quantize` names a recipe's calibrator, and what stays in fp32.
        engines: TensorRT engines to build: precisions of the graphs to build from (``fp16``), or
            :class:`~mlflow_tdeploy.EngineOptions`; or ready-made ones to take, each an
            :class:`~mlflow_tdeploy.EnginePlan`. None by default.
        budget: How far a variant may be from the original, for example ``"worst_cosine >= 0.99"``.
        on_budget: ``drop`` records a variant over budget and never serves it, ``raise`` fails.
        verify_with: Data to check variants with: texts, or a table with the columns ``text`` and ``label`` (then the
            task's metric is measured, too), or a list of mappings from tensor name to array; built-in texts when None.
        calibrate_with: Data that int8 variants find the ranges of activations on: like ``verify_with``, or a dataset, a
            reader with ``get_next``, or an iterator, of which at most 256 items are taken; what variants are checked
            with when None. A :class:`~mlflow_tdeploy.CalibrationData` says how many, by which seed, in what batches.
        search_seconds: How long a recipe looks for the best graph within the budget; 15 minutes when None. After that
            it only finds out how many parts have to be spared, those first that were found to matter by then.
        search_trials: After so many graphs that were tried, too; no such bound when None.
        revision: Commit, branch or tag of a hub model; the commit is recorded.
        token: Access token of the hub; never stored.
        trust_remote_code: Whether a hub model may run code of its own.
        opset: Opset of exported graphs.
        progress: Called with each finished step, which has a ``name``, ``seconds`` and a ``detail`` in words.
        mlflow_model: The MLflow model that the flavor is added to.
        signature: MLflow signature; made from the model's own when None. That of a text model states no inputs, so
            that the model sees whole requests (MLflow would cut a table down to its first column); Unity Catalog
            wants them stated: pass a signature.
        input_example: Example to store with the model; it does not change the signature.
        conda_env: Conda environment: a mapping or the path of a file.
        pip_requirements: Requirements, instead of the default ones.
        extra_pip_requirements: Requirements, beside the default ones.
        code_paths: Files and folders with code that the model needs.
        metadata: Any data to store in ``MLmodel``.
        extra_files: Further files to store with the model.
        model_config: Defaults for serving: ``variant``, ``runtime``, ``strict`` and the session options; a mapping or
            the path of a YAML file.

    Raises:
        MlflowException: Anything about the model, the parameters or the folder.
    """
    request = BundleRequest(
        task, tokenizer, shapes, example, labels, precisions, engines, budget, on_budget, verify_with, revision,
        token, trust_remote_code, opset, progress, calibrate_with, search_seconds, search_trials,
        image_processor,
    )  # fmt: skip
    packaging = Packaging(
        signature, input_example, conda_env, pip_requirements, extra_pip_requirements, code_paths, metadata,
        extra_files, model_config,
    )  # fmt: skip
    packaging.check()
    refuse_taken(Path(path))
    with request.prepare(model) as prepared:
        write_model(prepared, Path(path), request, packaging, mlflow_model)


def _check_servable(bundle: Bundle, forced: Policy) -> None:
    """Refuse to save a model whose own ``model_config`` keeps it from being opened anywhere.

    Raises:
        InvalidInputError: It insists on a variant that was not made, or is over budget.
    """
    formats = None if forced.runtime is None else RUNTIMES.get(forced.runtime).formats
    kept = [variant for variant in bundle.variants.values() if not variant.dropped]
    fitting = [variant.id for variant in kept if formats is None or variant.format in formats]
    if forced.variant in fitting or (forced.variant is None and fitting):
        return
    if forced.variant is None or forced.variant in {variant.id for variant in kept}:
        what = f"the variant '{forced.variant}'" if forced.variant else "any variant of this model"
        raise InvalidInputError(
            f"model_config insists on the runtime '{forced.runtime}', which does not open {what}. "
            f"Leave one of them out."
        )
    accuracy = latest_accuracy(bundle.evidence(forced.variant)) if forced.variant in bundle.variants else None
    why = accuracy.verdict if accuracy else bundle.absent.get(forced.variant, "it was not made")
    raise InvalidInputError(
        f"model_config insists on the variant '{forced.variant}', and that one cannot serve: {why}. Leave it out, or "
        f"state precisions=… and budget=… with which it can."
    )


@mlflow_errors()
def write_model(
    prepared: Prepared,
    path: Path,
    request: BundleRequest,
    packaging: Packaging,
    mlflow_model: MlflowModel | None = None,
) -> Bundle:
    """Write the model directory and return its bundle; all or nothing."""
    with staged_directory(path) as staged:
        forced = packaging.policy()
        request.write(prepared, staged / ROOT, forced.variant)
        bundle = Bundle.open(staged)
        _check_servable(bundle, forced)
        write_pack(staged / ROOT)
        write_report(bundle, staged)
        packaging.write(staged, bundle, mlflow_model or MlflowModel())
    return Bundle.open(path)
