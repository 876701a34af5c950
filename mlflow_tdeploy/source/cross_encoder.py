"""Source: a CrossEncoder of sentence-transformers, as an object or as a folder that it was saved to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks.text_ranking import function_named
from mlflow_tdeploy.source import transformers_model
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.source.sentence_transformer import check_prompts

RANKING, CLASSIFICATION = "text-ranking", "text-classification"
_SETTINGS = "config_sentence_transformers.json"


def is_folder(folder: Path) -> bool:
    """Tell whether a CrossEncoder was saved to a folder."""
    return _settings(folder).get("model_type") == "CrossEncoder"


def from_folder(folder: Path, options: Options, name: str, revision: str | None) -> Source:
    """Load a local folder: safetensors only.

    Raises:
        InvalidInputError: It has pickled weights only, modules behind its transformer, a prompt, or does to its scores
            what the logged model would not.
    """
    settings, modules = _settings(folder), json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    _check_modules([str(one.get("type", "")).rpartition(".")[2] for one in modules])
    check_prompts(_Prompts(dict(settings.get("prompts") or {}), settings.get("default_prompt_name")))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = options.task or _task_of(len(config.get("id2label") or {"0": "", "1": ""}))
    kept = {"function_to_apply": function_named(settings.get("activation_fn"))} if task == RANKING else {}
    return transformers_model.from_folder(
        folder, dataclasses.replace(options, task=task), name, revision, pipeline=kept
    )


def from_model_object(model: Any, options: Options) -> Source:
    """Read a CrossEncoder.

    Raises:
        InvalidInputError: See :func:`from_folder`; or it runs on something else than torch.
    """
    options.refuse("a CrossEncoder", "example", "tokenizer")
    _check_modules([type(module).__name__ for module in model])
    if getattr(model[0], "backend", "torch") != "torch":
        raise InvalidInputError(
            f"The CrossEncoder runs on {model[0].backend}, not on torch. Load it with backend='torch', or log its ONNX "
            f"graph."
        )
    check_prompts(model)
    task = options.task or _task_of(int(model.num_labels))
    function = function_named(type(model.activation_fn).__name__)
    options = dataclasses.replace(options, task=task, tokenizer=model.tokenizer)
    return transformers_model.from_model(
        model.model, options, max_length=model.max_length, pipeline={"function_to_apply": function}
    )


def _task_of(classes: int) -> str:
    return RANKING if classes == 1 else CLASSIFICATION


def _check_modules(names: list[str]) -> None:
    if names != ["Transformer"]:
        raise InvalidInputError(
            f"The CrossEncoder consists of {', '.join(names) or 'nothing'}: only those that are a transformer with a "
            f"head for scores can be exported."
        )


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """What a saved model says of prompts.

    Attributes:
        prompts: By name.
        default_prompt_name: Which is put before every text.
    """

    prompts: Mapping[str, str]
    default_prompt_name: str | None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
