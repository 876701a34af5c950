"""The one entry: any accepted model becomes a :class:`~mlflow_tdeploy.source.base.Source`.

torch and transformers are imported only where the kind of model needs them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import BrokenDependencyError, InvalidInputError, MissingDependencyError, NotFoundError
from mlflow_tdeploy.core.tasks import heads
from mlflow_tdeploy.core.tensors import Array
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from mlflow_tdeploy.source._hub import fetch, is_hub_id
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._progress import no_progress_bars
from mlflow_tdeploy.source.base import Source

_ACCEPTED = (
    "a transformers pipeline, a PreTrainedModel with its tokenizer, a SentenceTransformer or CrossEncoder, a folder or "
    "hub id, a torch.nn.Module with example inputs, an ONNX graph (path or ModelProto), or a mapping from variant id "
    "to graph"
)


@one_at_a_time()
def resolve(
    model: Any,
    *,
    task: str | None = None,
    tokenizer: Any = None,
    shapes: Mapping[str, object] | None = None,
    example: Mapping[str, Array] | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    image_processor: Any = None,
) -> Source:
    """Read a model of any accepted kind. The caller's object is never changed.

    Dimensions and ``shapes``: text models have ``batch`` and ``sequence``; ONNX graphs have the dimensions they
    name (an unnamed axis 0 is ``batch``, any other ``<input>_<axis>``). A torch module has ``batch``, which is
    axis 0 of every example input; other axes keep the example's size. ``shapes`` maps a dimension to its range
    ``(min, opt, max)``, ``(min, max)`` or one size. For torch modules it also takes ``"<input>.<axis>"``: a range
    makes that axis a dimension of its own, a name makes it a dimension shared under that name (whose range is then
    given as well), an int fixes it::

        shapes={"batch": (1, 8, 32), "ids.1": "sequence", "mask.1": "sequence", "sequence": (1, 128, 512), "bias.0": 4}

    Args:
        model: A transformers pipeline; a ``PreTrainedModel``; a ``SentenceTransformer``; a folder in one of their
            formats, an ``.onnx`` file or a hub id; a ``torch.nn.Module``; an ``onnx.ModelProto``; or a mapping from
            variant id to ONNX path or ModelProto.
        task: The task; inferred where None.
        tokenizer: A fast transformers tokenizer or its folder, for models that do not bring one.
        shapes: Ranges of dimensions.
        example: Example inputs of a torch module, named as its parameters; for ONNX graphs, optional.
        labels: Names of the classes, for text classification; the model's own where None.
        revision: Commit (or branch or tag) of a hub id; the commit it stands for is recorded.
        token: Access token for the hub.
        trust_remote_code: Run the hub repository's code; only with a full commit as revision.
        image_processor: A transformers image processor or its folder, for models of images that do not bring one.

    Raises:
        InvalidInputError: The arguments do not fit the model or each other.
        NotFoundError: There is no such file, folder or hub repository.
        ExportError: The tokenizer cannot be reproduced without transformers.
        MissingDependencyError: A package that this kind of model needs is not installed.
    """
    options = Options(task, tokenizer, shapes, example, labels, revision, token, trust_remote_code, image_processor)
    if isinstance(model, (str, os.PathLike)):
        return _from_location(model, options)
    if revision is not None:
        raise InvalidInputError("revision= belongs to a hub id. Leave it out for a model that is loaded already.")
    if isinstance(model, Mapping) or _is(model, "onnx", "ModelProto"):
        from mlflow_tdeploy.source.onnx_graph import from_graphs

        return from_graphs(model, options)
    return _from_object(model, options)


def _from_object(model: Any, options: Options) -> Source:
    if _is(model, "torch", "ScriptModule"):
        raise InvalidInputError(
            "TorchScript modules are not supported: their code cannot be exported. Pass the torch.nn.Module itself."
        )
    if _is(model, "peft", "PeftModel") and options.task != "tensors":
        raise InvalidInputError(
            "A PEFT adapter on its model cannot be kept as one: merge it first, model = model.merge_and_unload()."
        )
    if _is(model, "sentence_transformers", "SentenceTransformer"):
        from mlflow_tdeploy.source import sentence_transformer

        return sentence_transformer.from_model_object(model, options)
    if _is(model, "sentence_transformers", "CrossEncoder"):
        from mlflow_tdeploy.source import cross_encoder

        return cross_encoder.from_model_object(model, options)
    if _is(model, "transformers", "Pipeline"):
        from mlflow_tdeploy.source import transformers_model

        return transformers_model.from_pipeline(model, options)
    if _is(model, "transformers", "PreTrainedModel") and options.task != "tensors":
        from mlflow_tdeploy.source import transformers_model

        return transformers_model.from_model(model, options)
    if _is(model, "torch", "Module"):
        from mlflow_tdeploy.source import torch_module

        return torch_module.from_module(model, options)
    raise InvalidInputError(f"Cannot log a {type(model).__name__}. Accepted: {_ACCEPTED}.")


def _from_location(model: str | os.PathLike[str], options: Options) -> Source:
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file() or path.suffix == ".onnx":
        if options.revision is not None:
            raise InvalidInputError(f"revision= belongs to a hub id, and '{model}' is a local path. Leave it out.")
        if not path.is_dir():
            return _from_file(path, options)
        return _from_folder(path, options, path.resolve().name, None)
    if not isinstance(model, str) or not is_hub_id(model):
        raise NotFoundError(f"There is no file or folder '{model}', and it is no hub id. Accepted: {_ACCEPTED}.")
    _need_transformers()
    folder, commit = fetch(model, options)
    return _from_folder(folder, options, model, commit)


def _from_file(path: Path, options: Options) -> Source:
    if path.suffix != ".onnx":
        raise InvalidInputError(
            f"'{path.name}' is no ONNX graph. Pass a folder in Hugging Face format or an .onnx file; pickled models "
            f"(.pt, .bin, .pkl) are not read: load them yourself and pass the object."
        )
    from mlflow_tdeploy.source.onnx_graph import from_graphs

    return from_graphs(path, options)


def _from_folder(folder: Path, options: Options, name: str, revision: str | None) -> Source:
    graphs = sorted(folder.glob("*.onnx"))
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        hint = f" Pass the graph itself: '{graphs[0].name}' in it." if graphs else ""
        raise InvalidInputError(
            f"'{name}' is no model folder: it has neither config.json (transformers) nor modules.json "
            f"(sentence-transformers).{hint}"
        )
    if options.task == "tensors":
        raise InvalidInputError(
            "task='tensors' needs a model object and example inputs, or an ONNX graph. Load the folder and pass the "
            "model with example=."
        )
    _need_transformers()
    with no_progress_bars():
        return _from_model_folder(folder, options, name, revision)


def _from_model_folder(folder: Path, options: Options, name: str, revision: str | None) -> Source:
    from mlflow_tdeploy.source import cross_encoder

    if cross_encoder.is_folder(folder):
        return cross_encoder.from_folder(folder, options, name, revision)
    head = heads().get(options.task or "")
    pooled = (folder / "modules.json").is_file() and not (head is not None and head.architecture)
    if pooled or options.task == "sentence-embedding":
        from mlflow_tdeploy.source import sentence_transformer

        return sentence_transformer.from_folder(folder, options, name, revision)
    from mlflow_tdeploy.source import transformers_model

    return transformers_model.from_folder(folder, options, name, revision)


def _need_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        # transformers looks for some by their distributions; their errors hold a whole sentence
        named = re.search(r"[A-Za-z0-9][A-Za-z0-9._-]*(?=[ '=<>~!]|$)", str(error.name).removeprefix("The "))
        package = named[0] if named else str(error.name)
        raise MissingDependencyError(
            package, "Logging a Hugging Face model", "pip install 'mlflow-tdeploy[build]'"
        ) from None
    except Exception as error:  # a library of theirs that cannot be opened
        raise BrokenDependencyError("Logging a Hugging Face model", error) from error


def _is(model: Any, package: str, name: str) -> bool:
    """Tell whether an object is of a package's class, or of one derived from it, without importing the package."""
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == package for kind in type(model).__mro__)
