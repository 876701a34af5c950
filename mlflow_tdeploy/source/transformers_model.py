"""Transformers models: a pipeline, a ``PreTrainedModel`` with its tokenizer, or a folder."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tasks import TASKS, Head, heads, refuse_arguments
from mlflow_tdeploy.runtime.backends._torch_modules import TransformersModule, load_transformers
from mlflow_tdeploy.source import image_model
from mlflow_tdeploy.source._hugging_face import asked, record_of, saver, serving_module
from mlflow_tdeploy.source._image_processor import image_heads
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._padding import settle_padding
from mlflow_tdeploy.source._text_model import TextModelSource, check_vocabulary, probe_signature
from mlflow_tdeploy.source._tokenizer import (
    check_parity,
    check_tokenizer,
    encode_with,
    task_tokens,
    text_dims,
    text_inputs,
    token_limit,
    tokenizer_settings,
)
from mlflow_tdeploy.source.base import Source

_log = logging.getLogger("mlflow_tdeploy")
#: Other names of pipelines, as transformers has them.
_ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}
#: Tokenizer arguments of a pipeline that change nothing here: texts are truncated and padded anyway.
_HARMLESS = {"truncation", "padding", "return_tensors", "max_length"}


def from_pipeline(pipeline: Any, options: Options) -> Source:
    """Read a transformers pipeline: its model, tokenizer, task, and the settings it was made with.

    Raises:
        InvalidInputError: Its task is not supported, or it has settings that cannot be kept.
    """
    named = _ALIASES.get(pipeline.task, pipeline.task)
    if (options.task or named) in image_heads():
        return image_model.from_pipeline(pipeline, options)
    if options.task is None and named not in _heads():
        known = ", ".join((*_heads(), *image_heads()))
        raise InvalidInputError(
            f"Pipelines for '{pipeline.task}' are not supported. Supported: {known}; or log its model with "
            f"task='tensors' and example inputs."
        )
    options = dataclasses.replace(
        options, task=options.task or named, tokenizer=options.tokenizer or pipeline.tokenizer
    )
    preprocess = dict(getattr(pipeline, "_preprocess_params", {}))
    said = {name for name, value in preprocess.items() if (name, value) != ("is_split_into_words", False)}
    refuse_arguments(said - _HARMLESS - set(TASKS.get(options.task or "").pipeline_arguments))
    postprocess = dict(getattr(pipeline, "_postprocess_params", {}))
    if postprocess.get("top_k", 1) != 1 and not hasattr(TASKS.get(options.task or "").settings, "top_k"):
        _log.warning("The pipeline's top_k=%r is not kept: pass params={'top_k': …} to predict.", postprocess["top_k"])
    return from_model(
        pipeline.model, options, max_length=preprocess.get("max_length"), pipeline=preprocess | postprocess
    )


def _heads() -> dict[str, Head]:
    """Return what tasks need of transformers' own models of texts, by task."""
    return {task: head for task, head in heads().items() if head.auto_class and TASKS.get(task).input_kind == "text"}


def from_folder(
    folder: Path, options: Options, name: str, revision: str | None, *, pipeline: Mapping[str, Any] | None = None
) -> Source:
    """Load a local folder in transformers format: safetensors only.

    Args:
        folder: The folder.
        options: What the caller said.
        name: What it is called.
        revision: Its commit on the hub.
        pipeline: See :func:`from_model`.

    Raises:
        InvalidInputError: It has pickled weights only, or its architecture fits no task.
    """
    architecture = _architecture(folder, options)
    kind = getattr(transformers, architecture, None)
    if image_model.reads_images(kind, options):
        return image_model.from_folder(folder, options, name, revision, architecture)
    options.refuse("a text model", "image_processor")
    task = options.pick_task(options.task or infer_task(architecture), tuple(_heads()), architecture)
    options = dataclasses.replace(options, task=task, tokenizer=check_tokenizer(options.tokenizer or folder, task))
    model = load_transformers(folder, _heads()[task], trust_remote_code=options.trust_remote_code)
    record = SourceRecord("transformers", name, revision, type(model).__name__)
    return from_model(model, options, record=record, pipeline=pipeline)


def from_model(
    model: Any,
    options: Options,
    *,
    record: SourceRecord | None = None,
    max_length: int | None = None,
    pipeline: Mapping[str, Any] | None = None,
) -> Source:
    """Read a ``PreTrainedModel`` with its tokenizer.

    Args:
        model: The model.
        options: What the caller said.
        record: Where it came from; read from the model when None.
        max_length: Where a pipeline truncates.
        pipeline: What a pipeline does with the output.

    Raises:
        InvalidInputError: Task, tokenizer or shapes do not fit the model.
        ExportError: The tokenizer cannot be reproduced.
    """
    if image_model.reads_images(type(model), options):
        return image_model.from_model(model, options, record=record)
    image_model.refuse_both(model)
    arrays = ", or say task='tensors' if this model takes arrays: sound, tokens"
    options.refuse("a text model", "example", otherwise=arrays)
    options.refuse("a text model", "image_processor")
    architecture = type(model).__name__
    task = options.pick_task(options.task or infer_task(architecture), tuple(_heads()), architecture)
    head, tokenizer = _heads()[task], check_tokenizer(options.tokenizer, task)
    if not head.architecture and not head.of(architecture):
        model = model.base_model  # as AutoModel, and so the pipeline, would load it
    check_vocabulary(model, tokenizer)
    limit = position_limit(model)
    longest = token_limit(tokenizer, limit, max_length)
    module, notes = serving_module(TransformersModule(model, head.outputs))
    inputs = text_inputs(tokenizer, accepted_inputs(model))
    dims = text_dims(tokenizer, longest, limit, options.shapes)
    signature = probe_signature(module, tokenizer, inputs, dims, head)
    size = signature.outputs[0].shape[-1]
    width = size if isinstance(size, int) else 0
    own = TASKS.get(task).settings_of(model.config.to_dict(), width, options.labels, pipeline or {})
    config = tokenizer_settings(tokenizer, longest) | task_tokens(task, tokenizer) | own
    signature, config = settle_padding(asked(module), task, config, signature, tokenizer, accepted_inputs(model))
    check_parity(task, config, signature, tokenizer, encode_with(tokenizer, longest))
    record = record or record_of(model, "transformers")
    return TextModelSource(tokenizer, record, task, config, signature, module, saver(model, tokenizer), notes)


def infer_task(architecture: str) -> str:
    """Return the task that an architecture's name tells.

    Raises:
        InvalidInputError: It tells none.
    """
    for task, head in _heads().items():
        if head.of(architecture):
            return task
    raise InvalidInputError(
        f"No task is known for the architecture {architecture or 'without a name'}. Pass task=: "
        f"{', '.join(heads())}, or task='tensors' with example inputs."
    )


def position_limit(model: torch.nn.Module) -> int | None:
    """Return how many tokens a model has positions for, or None where nothing says."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:  # XLNet says -1 for no limit
        return None
    for part in model.modules():
        table = getattr(part, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            return limit - table.padding_idx - 1  # RoBERTa's positions begin after the padding's
    return limit


def accepted_inputs(model: Any) -> set[str]:
    """Return the names of the tensors that a model's ``forward`` takes.

    Raises:
        InvalidInputError: It takes no token ids.
    """
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if "input_ids" not in names and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        # handed on, as a subclass's forward(*args, **kwargs) does
        parents = (
            set(inspect.signature(kind.forward).parameters) for kind in type(model).__mro__ if hasattr(kind, "forward")
        )
        names |= next((found for found in parents if "input_ids" in found), set())
    if "input_ids" not in names:
        raise InvalidInputError(
            f"{type(model).__name__}.forward takes {', '.join(parameters)}, and no input_ids: it reads no texts. Log "
            f"it with task='tensors' and example inputs."
        )
    return names


def _architecture(folder: Path, options: Options) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=options.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(f"Cannot read the model's config.json in '{folder.name}': {error}") from error
    return next(iter(config.architectures or []), "")
