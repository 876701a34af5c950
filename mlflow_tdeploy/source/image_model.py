"""Transformers models that read images: a pipeline, a ``PreTrainedModel`` with its image processor, or a folder."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tasks import TASKS, Head
from mlflow_tdeploy.core.tasks._image import INPUT
from mlflow_tdeploy.core.tensors import Array, Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime.backends._torch_modules import TransformersModule, load_transformers, run_module
from mlflow_tdeploy.source._hugging_face import HuggingFaceSource, record_of, saver, serving_module
from mlflow_tdeploy.source._image_processor import check_image_parity, image_heads, open_processor, processor_settings
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._shapes import BATCH, make_dims
from mlflow_tdeploy.source.base import Source

_log = logging.getLogger("mlflow_tdeploy")
#: Arguments of a pipeline that change nothing of an answer.
_HARMLESS = {"timeout", "return_tensors"}


def reads_images(kind: type | None, options: Options) -> bool:
    """Tell whether a model is to be logged as one of images: as the user says, else as its class does.

    Args:
        kind: Its class; None where that is not known.
        options: What the caller said.
    """
    if options.task is not None:
        return options.task in image_heads()
    return getattr(kind, "main_input_name", "") == INPUT or options.image_processor is not None


def refuse_both(model: Any) -> None:
    """Refuse a model of texts and images: a graph is one of its halves.

    Raises:
        InvalidInputError: It is one.
    """
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        name = type(model).__name__.removesuffix("Model")
        raise InvalidInputError(
            f"{type(model).__name__} reads texts and images, and a graph is one of its halves: log "
            f"transformers.{name}VisionModel (or {name}VisionModelWithProjection).from_pretrained(…) with "
            f"image_processor=, or {name}TextModel.from_pretrained(…) with tokenizer=."
        )


def from_pipeline(pipeline: Any, options: Options) -> Source:
    """Read a transformers pipeline of images.

    Raises:
        InvalidInputError: It has settings that cannot be kept.
    """
    options = dataclasses.replace(
        options,
        task=options.task or pipeline.task,
        image_processor=options.image_processor or pipeline.image_processor,
    )
    before = dict(getattr(pipeline, "_preprocess_params", {}))
    after = dict(getattr(pipeline, "_postprocess_params", {}))
    if unknown := set(before) - _HARMLESS:
        raise InvalidInputError(
            f"The pipeline was made with '{min(unknown)}' for its image processor, which the logged model would not "
            f"know. Make the processor with it, and pass that: image_processor=."
        )
    for name, usual in (("top_k", 5), ("pool", False)):
        if after.get(name, usual) != usual:
            _log.warning("The pipeline's %s=%r is not kept: pass params={'%s': …} to predict.", name, after[name], name)
    return from_model(pipeline.model, options, function=after.get("function_to_apply"))


def from_folder(folder: Path, options: Options, name: str, revision: str | None, architecture: str) -> Source:
    """Load a local folder in transformers format: safetensors only.

    Args:
        folder: The folder.
        options: What the caller said.
        name: What it is called.
        revision: Its commit on the hub.
        architecture: Name of the model's class.
    """
    task = _task(architecture, options)
    processor = open_processor(options.image_processor or folder)
    options = dataclasses.replace(options, task=task, image_processor=processor)
    head = image_heads()[task]
    # the body of a classifier is that of the whole: loaded by itself, it would have a pooler that nobody trained
    whole = head if head.architecture else _head_of(architecture) or head
    model = load_transformers(folder, whole, trust_remote_code=options.trust_remote_code)
    record = SourceRecord("transformers", name, revision, type(model).__name__)
    return from_model(model, options, record=record)


def from_model(model: Any, options: Options, *, record: SourceRecord | None = None, function: Any = None) -> Source:
    """Read a ``PreTrainedModel`` of images with its image processor.

    Args:
        model: The model.
        options: What the caller said.
        record: Where it came from; read from the model when None.
        function: What a pipeline applies to the logits; as the model's config says when None.

    Raises:
        InvalidInputError: Task, image processor or shapes do not fit the model.
        ExportError: The image processor cannot be reproduced.
    """
    refuse_both(model)
    options.refuse("a model of images", "example", "tokenizer")
    task = _task(type(model).__name__, options)
    head, processor = image_heads()[task], open_processor(options.image_processor)
    whole = _head_of(type(model).__name__)
    if not head.architecture and whole is not None and whole.architecture:
        model = model.base_model  # as AutoModel, and so the pipeline, would load it
    config = processor_settings(processor)
    shape = tuple(config.get("crop") or config["size"])
    dims = make_dims((Dim.of("batch", BATCH),), options.shapes)
    module, notes, signature = _probed(model, head, shape, dims)
    size = signature.outputs[0].shape[-1]
    width = size if isinstance(size, int) else 0
    pipeline = {} if function is None else {"function_to_apply": function}
    config |= TASKS.get(task).settings_of(model.config.to_dict(), width, options.labels, pipeline)
    check_image_parity(task, config, signature, processor)
    record = record or record_of(model, "transformers")
    return HuggingFaceSource(record, task, config, signature, module, saver(model, processor), notes)


def _told_by(architecture: str) -> str:
    """Return the task that an architecture's name tells; empty for none."""
    return next((task for task, head in image_heads().items() if head.of(architecture)), "")


def _head_of(architecture: str) -> Head | None:
    return image_heads().get(_told_by(architecture))


def _task(architecture: str, options: Options) -> str:
    inferred = _told_by(architecture)
    if options.task is None and not inferred:
        raise InvalidInputError(
            f"No task is known for {architecture or 'a model without architecture'}, which reads images. Pass task=: "
            f"{', '.join(image_heads())}, or task='tensors' with example inputs."
        )
    return options.pick_task(inferred, tuple(image_heads()), architecture)


def _probed(
    model: Any, head: Head, shape: tuple[int, ...], dims: tuple[Dim, ...]
) -> tuple[torch.nn.Module, tuple[str, ...], Signature]:
    """Run a model on two images and return its module, notes on it, and its signature.

    Raises:
        InvalidInputError: It cannot be run on images of that size, or returns something of another form.
    """
    feeds = {INPUT: np.zeros((2, 3, *shape), np.float32)}
    module, notes = serving_module(TransformersModule(model, head.outputs if head.architecture else ()))
    whole: Any = module
    try:
        with torch.inference_mode():
            returned = whole.returned(**{INPUT: torch.from_numpy(feeds[INPUT])})
    except InvalidInputError:
        raise
    except Exception as error:  # whatever a model's own code meets
        height, width = shape
        raise InvalidInputError(
            f"The model cannot be run on {INPUT} of two images of {width} x {height}: {type(error).__name__}: "
            f"{first_line(error)}. Check that model and image processor belong together."
        ) from error
    found = [name for name, value in returned.items() if isinstance(value, torch.Tensor)]
    first = head.outputs if head.architecture else found[:1]  # what the pipeline takes
    names = (*first, *(name for name in head.optional if name in found and name not in first))
    module = TransformersModule(whole.model, names)
    arrays = run_module(module, feeds, names)
    outputs = tuple(_output(head, name, array, len(feeds[INPUT])) for name, array in arrays.items())
    return module, notes, Signature(dims, (TensorSpec(INPUT, "float32", ("batch", 3, *shape)),), outputs)


def _output(head: Head, name: str, array: Array, rows: int) -> TensorSpec:
    if array.ndim < len(head.axes) + head.wide or len(array) != rows:
        raise InvalidInputError(
            f"The output '{name}' has shape {array.shape} for {rows} images: the task needs a row of each, with a "
            f"width."
        )
    return TensorSpec(name, str(array.dtype), ("batch", *map(int, array.shape[1:])))
