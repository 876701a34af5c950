"""SentenceTransformers: an object or a folder, pooled and normalized inside the graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import ExportError, InvalidInputError
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tasks import heads
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.runtime.backends._torch_modules import (
    MODULES_FILE,
    SentenceTransformerModule,
    check_sentence_module,
    load_sentence_transformer,
)
from mlflow_tdeploy.source._hugging_face import asked, own_code, record_of, serving_module
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._padding import settle_padding
from mlflow_tdeploy.source._text_model import TextModelSource, check_vocabulary, probe_signature
from mlflow_tdeploy.source._tokenizer import (
    Encode,
    check_parity,
    check_tokenizer,
    text_dims,
    text_inputs,
    token_limit,
    tokenizer_settings,
)
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.source.transformers_model import accepted_inputs, from_model, position_limit

_log = logging.getLogger("mlflow_tdeploy")
TASK = "sentence-embedding"


def from_folder(folder: Path, options: Options, name: str, revision: str | None) -> Source:
    """Load a local folder: safetensors only, sentence-transformers' own modules only.

    Raises:
        InvalidInputError: It has pickled weights only, or modules that cannot be exported.
    """
    if not (folder / MODULES_FILE).is_file():
        _log.warning("'%s' has no %s: token vectors are pooled by their mean.", folder.name, MODULES_FILE)
    model = load_sentence_transformer(folder, trust_remote_code=options.trust_remote_code)
    record = SourceRecord("sentence-transformers", name, revision, type(model[0].auto_model).__name__)
    return from_model_object(model, options, record=record)


def from_model_object(model: Any, options: Options, *, record: SourceRecord | None = None) -> Source:
    """Read a SentenceTransformer.

    Raises:
        InvalidInputError: It has modules, prompts or a backend that cannot be kept, or shapes do not fit.
        ExportError: Its tokenization cannot be reproduced.
    """
    check_chain(model)
    options.refuse("a SentenceTransformer", "example", "tokenizer", "image_processor")
    transformer = model[0].auto_model
    tokenizer = check_tokenizer(model.tokenizer, options.task or TASK)
    if options.task == "feature-extraction":
        return from_model(transformer, dataclasses.replace(options, tokenizer=tokenizer), record=record)
    options.refuse(f"task '{TASK}'", "labels")
    options.pick_task(TASK, (TASK, "feature-extraction"), "A SentenceTransformer")
    check_vocabulary(transformer, tokenizer)
    prompts = _prompts(model)
    limit = position_limit(transformer)
    longest = token_limit(tokenizer, limit, model.max_seq_length)
    module, notes = serving_module(SentenceTransformerModule(model, model.truncate_dim))
    inputs = text_inputs(tokenizer, accepted_inputs(transformer))
    dims = text_dims(tokenizer, longest, limit, options.shapes)
    signature = probe_signature(module, tokenizer, inputs, dims, heads()[TASK])
    padding = {"padding_side": str(tokenizer.padding_side), "max_length": longest}
    signature, settled = settle_padding(
        asked(module), TASK, padding, signature, tokenizer, accepted_inputs(transformer)
    )
    config = _matching_settings(model, tokenizer, longest, signature, str(settled["padding_side"]))
    config |= {"pads": settled.get("pads", True), **prompts}
    record = record or record_of(transformer, "sentence-transformers")

    def save(folder: Path) -> None:
        if not type(transformer).__module__.startswith("transformers."):
            raise own_code(transformer)
        model.save(str(folder), safe_serialization=True, create_model_card=False)

    source = TextModelSource(tokenizer, record, TASK, config, signature, module, save, notes)
    source.packages = ("sentence-transformers",)
    return source


def check_chain(model: Any) -> None:
    """Make sure that every module can be part of a graph, and the first reads texts.

    Raises:
        InvalidInputError: One cannot.
    """
    for module in model:
        check_sentence_module(type(module).__module__, type(module).__name__)
    first = model[0]
    text = getattr(first, "modality_config", {"text": {"method": "forward"}}).get("text", {})
    if type(first).__name__ != "Transformer" or text.get("method") != "forward":
        raise InvalidInputError(
            f"The SentenceTransformer's first module, {type(first).__name__}, does not read texts with a transformer: "
            f"only such models can be exported."
        )
    if getattr(first, "backend", "torch") != "torch":
        raise InvalidInputError(
            f"The SentenceTransformer runs on {first.backend}, not on torch. Load it with backend='torch', or log its "
            f"ONNX graph."
        )


def _prompts(model: Any) -> dict[str, Any]:
    """Return a SentenceTransformer's prompts as settings.

    Raises:
        InvalidInputError: Its pooling leaves out their tokens, which a graph does not know.
    """
    prompts = {
        str(name): str(text) for name, text in (getattr(model, "prompts", None) or {}).items() if text is not None
    }
    if any(prompts.values()) and any(getattr(module, "include_prompt", True) is False for module in model):
        raise InvalidInputError(
            "The SentenceTransformer leaves the tokens of its prompts out when it pools (include_prompt=False), and a "
            "graph does not know which those are. Set model.prompts = {} and log it without them."
        )
    return {"prompts": prompts, "default_prompt": getattr(model, "default_prompt_name", None) or ""} if prompts else {}


def check_prompts(prompts: Mapping[str, str] | None, chosen: str | None, who: str) -> None:
    """Refuse a prompt that a model would put before every text; warn of those it puts only when told.

    Args:
        prompts: By name.
        chosen: Name of the one that is put there.
        who: What the model is.

    Raises:
        InvalidInputError: There is such a default prompt.
    """
    prompts = {name: text for name, text in (prompts or {}).items() if text}
    default = prompts.get(chosen or "")
    if default:
        raise InvalidInputError(
            f"The {who} puts its default prompt {default!r} before every text; the logged model would "
            f"not. Set model.default_prompt_name = None, log it, and put the prompt into the texts."
        )
    if prompts:
        _log.warning("The prompts of the %s (%s) are not applied: put them into the texts.", who, ", ".join(prompts))


def _matching_settings(model: Any, tokenizer: Any, longest: int, signature: Signature, side: str) -> dict[str, Any]:
    """Return the settings that tokenize as the model does: releases before 6 strip texts, later ones do not."""
    expected = _encode_with(model)
    config = tokenizer_settings(tokenizer, longest) | {"padding_side": side}
    try:
        check_parity(TASK, config, signature, tokenizer, expected)
    except ExportError:
        config = config | {"strip": True}
        check_parity(TASK, config, signature, tokenizer, expected)
    return config


def _encode_with(model: Any) -> Encode:
    """Return the SentenceTransformer's own tokenization of one text."""
    tokenize = getattr(model, "preprocess", None) or model.tokenize

    def encode(text: str) -> Mapping[str, Sequence[int]]:
        features = tokenize([text])
        return {name: features[name][0].tolist() for name in ("input_ids", "token_type_ids") if name in features}

    return encode
