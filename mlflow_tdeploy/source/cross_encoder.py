"""Source: a CrossEncoder of sentence-transformers, as an object or as a folder that it was saved to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks.text_ranking import function_named, saved_activation
from mlflow_tdeploy.source import transformers_model
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.source.sentence_transformer import check_prompts

RANKING, CLASSIFICATION = "text-ranking", "text-classification"
_SETTINGS, _MODULES = "config_sentence_transformers.json", "modules.json"
_ONLY = "Transformer"


def is_folder(folder: Path) -> bool:
    """Tell whether a CrossEncoder was saved to a folder, by any version of sentence-transformers."""
    if _json(folder / _SETTINGS).get("model_type") == "CrossEncoder":
        return True
    return not (folder / _MODULES).is_file() and bool(saved_activation(_json(folder / "config.json")))


def from_folder(folder: Path, options: Options, name: str, revision: str | None) -> Source:
    """Load a local folder: safetensors only.

    Raises:
        InvalidInputError: It has pickled weights only, modules behind its transformer, a prompt, or does to its scores
            what the logged model would not.
    """
    settings, config = _json(folder / _SETTINGS), _json(folder / "config.json")
    modules = json.loads((folder / _MODULES).read_text(encoding="utf-8")) if (folder / _MODULES).is_file() else []
    _check_modules([str(one.get("type", "")).rpartition(".")[2] for one in modules] or [_ONLY])
    check_prompts(dict(settings.get("prompts") or {}), settings.get("default_prompt_name"), "CrossEncoder")
    classes = len(config.get("id2label") or {"0": "", "1": ""})  # transformers' own default, where nothing says
    activation = settings.get("activation_fn") or saved_activation(config)
    options = dataclasses.replace(options, task=options.task or _task_of(classes))
    return transformers_model.from_folder(folder, options, name, revision, pipeline=_kept(activation, classes))


def from_model_object(model: Any, options: Options) -> Source:
    """Read a CrossEncoder.

    Raises:
        InvalidInputError: See :func:`from_folder`; or it runs on something else than torch.
    """
    options.refuse("a CrossEncoder", "example", "tokenizer", "image_processor")
    _check_modules([type(module).__name__ for module in model] if hasattr(model, "__iter__") else [_ONLY])
    if (backend := getattr(model, "backend", "torch")) != "torch":
        raise InvalidInputError(
            f"The CrossEncoder runs on {backend}, not on torch. Load it with backend='torch', or log its ONNX graph."
        )
    check_prompts(getattr(model, "prompts", None), getattr(model, "default_prompt_name", None), "CrossEncoder")
    classes, longest = int(model.num_labels), getattr(model, "max_seq_length", None) or model.max_length
    task = options.task or _task_of(classes)
    options = dataclasses.replace(options, task=task, tokenizer=model.tokenizer)
    kept = _kept(type(model.activation_fn).__name__, classes)
    return transformers_model.from_model(model.model, options, max_length=longest, pipeline=kept)


def _kept(activation: str, classes: int) -> dict[str, Any]:
    """Return what a logged model does to scores as the CrossEncoder does, and that it is one."""
    usual = "Sigmoid" if classes == 1 else "Identity"
    return {"function_to_apply": function_named(activation, usual), "pairs": True}


def _task_of(classes: int) -> str:
    return RANKING if classes == 1 else CLASSIFICATION


def _check_modules(names: list[str]) -> None:
    if names != [_ONLY]:
        raise InvalidInputError(
            f"The CrossEncoder consists of {', '.join(names) or 'nothing'}: only those that are a transformer with a "
            f"head for scores can be exported."
        )


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
