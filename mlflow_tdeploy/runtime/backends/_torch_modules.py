"""Hugging Face models as modules that take a signature's inputs and return its outputs.

Shared by the sources, which export and compare with them, and by the reference runtime, which serves them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mlflow_tdeploy.core.errors import (
    IntegrityError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
    first_line,
)
from mlflow_tdeploy.core.tasks import Head, heads
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.store.layout import safe_path

M = TypeVar("M", bound=torch.nn.Module)

MODULES_FILE = "modules.json"
#: Modules of sentence-transformers that compute the same in a graph, whatever the text.
SENTENCE_MODULES = (
    "Transformer", "Pooling", "WeightedLayerPooling", "WordWeights", "Dense", "Normalize", "LayerNorm", "Dropout",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_HALF = (torch.float16, torch.bfloat16)
#: What a Hugging Face model may be in, and is not served in: runtimes have few operators in float64.
OTHER_FLOATS = (*_HALF, torch.float64)


class TransformersModule(torch.nn.Module):
    """A transformers model that returns some of its outputs, by name."""

    def __init__(self, model: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._outputs = tuple(outputs)
        parameters = inspect.signature(model.forward).parameters
        # keys and values of a decoder are no output of these tasks
        self._fixed = {"use_cache": False} if "use_cache" in parameters else {}
        if "return_dict" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            self._fixed["return_dict"] = True

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs, in order."""
        outputs = self.returned(**inputs)
        if lacking := [name for name in self._outputs if name not in outputs]:
            raise InvalidInputError(
                f"{type(self.model).__name__} returns {', '.join(outputs)}, and not '{lacking[0]}', which its task "
                f"needs. Choose another task, or log it with task='tensors' and example inputs."
            )
        return tuple(outputs[name] for name in self._outputs)

    def returned(self, **inputs: torch.Tensor) -> Mapping[str, Any]:
        """Return all outputs, by name."""
        outputs = self.model(**inputs, **self._fixed)
        if not isinstance(outputs, Mapping):
            raise InvalidInputError(
                f"{type(self.model).__name__}.forward returns {type(outputs).__name__}, not outputs by name as "
                f"transformers' models do. Return a ModelOutput, or log it with task='tensors' and example inputs."
            )
        return outputs


class SentenceTransformerModule(torch.nn.Module):
    """The modules of a SentenceTransformer, one after the other, ending in the sentence embedding.

    Args:
        model: The SentenceTransformer.
        width: Length to cut the embedding to (``truncate_dim``); None for all of it.
    """

    def __init__(self, model: Iterable[torch.nn.Module], width: int | None = None) -> None:
        super().__init__()
        self.chain = torch.nn.ModuleList(model)
        self._width = width

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the sentence embedding as a tuple of one."""
        features: dict[str, Any] = dict(inputs)
        for module in self.chain:
            features = module(features)
        embedding = features["sentence_embedding"]
        return (embedding if self._width is None else embedding[..., : self._width],)


def run_module(module: torch.nn.Module, feeds: Mapping[str, Any], names: Iterable[str]) -> Arrays:
    """Run a module that returns a tuple on arrays, and name what it returns."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    with torch.inference_mode():
        outputs = module(**tensors)
    return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


def serving_copy(module: Any, converted: Collection[torch.dtype] = _HALF) -> tuple[Any, str]:
    """Return a copy of a module in evaluation mode on the CPU, and a note of what was converted.

    The caller's object stays as it is. Weights that are on the CPU and need no conversion are shared, not copied.

    Args:
        module: The module.
        converted: The dtypes that become fp32.
    """
    tensors = [*module.parameters(), *module.buffers()]
    others = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype in converted})
    moved = others or any(tensor.device.type != "cpu" for tensor in tensors)
    copied = copy_sharing(module, () if moved else tensors)
    if moved:
        copied = copied.to("cpu")
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.dtype in converted:  # not .float(): buffers of other kinds keep theirs
                tensor.data = tensor.data.float()
    note = f"the reference computes in fp32; its weights are stored as {', '.join(others)}" if others else ""
    return copied.eval(), note


def copy_sharing(module: M, tensors: Iterable[torch.Tensor]) -> M:
    """Return a copy of a module that shares some tensors with it.

    What a forward has left in it (``weight_norm`` leaves the weight, others states or maps of attention), with its way
    back for gradients, is shared too, without that way: torch does not copy it.

    Raises:
        InvalidInputError: Something in it cannot be copied.
    """
    left = (one for part in module.modules() for one in _tensors_within(vars(part)))
    shared = {id(one): one.detach() for one in left if not one.is_leaf}
    try:
        return copy.deepcopy(module, {**shared, **{id(one): one for one in tensors}})
    except Exception as error:
        raise InvalidInputError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}). Where a forward "
            f"has left something in it, call it once under torch.no_grad() before; keep what cannot be copied (a file, "
            f"a lock, a connection) outside of it."
        ) from error


def _tensors_within(found: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers, however deep."""
    waiting, seen = [found], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (Mapping, list, tuple, set, frozenset, deque)) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, Mapping) else one)


def set_attention(module: torch.nn.Module, implementation: str) -> None:
    """Set the attention implementation of every transformers model inside; eager where it is not supported."""
    from transformers import PreTrainedModel

    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    for model in models[:1]:  # it sets that of the models within
        try:
            model.set_attn_implementation(implementation)
        except (ValueError, ImportError):
            model.set_attn_implementation("eager")


def load_module(folder: Path, signature: Signature, task: str) -> torch.nn.Module:
    """Load what a source wrote.

    Args:
        folder: The folder.
        signature: The model's.
        task: Its task, which knows the kind of model.

    Raises:
        InvalidInputError: The folder holds no such model, or has weights that are no safetensors.
    """
    output, head = signature.outputs[0], heads().get(task)
    if head is None:
        raise InvalidInputError(f"'{folder.name}' was saved for the task '{task}', which is about no such model here.")
    module: torch.nn.Module
    with _quiet_transformers():
        if not head.auto_class:
            width = output.shape[-1] if isinstance(output.shape[-1], int) else None
            module = SentenceTransformerModule(load_sentence_transformer(folder), width)
        else:
            names = [spec.name for spec in signature.outputs]
            module = TransformersModule(load_transformers(folder, head), names)
    module, _ = serving_copy(module, OTHER_FLOATS)
    set_attention(module, "sdpa")
    return module


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from showing progress and reports: whether it is the right model is checked by its answers."""
    from transformers.utils import logging as library

    logging: Any = library  # its functions have no types
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load_transformers(folder: Path, head: Head, *, trust_remote_code: bool = False) -> Any:
    """Load a transformers model from a local folder: safetensors only.

    Args:
        folder: A folder with ``config.json``.
        head: Which kind of model.
        trust_remote_code: Whether code of the folder may run; never when serving.
    """
    check_weights(folder)
    if not (folder / "config.json").is_file():
        raise NotFoundError(
            f"'{folder.name}' keeps its transformer in a folder of its own, as old sentence-transformers models do. "
            f"Pass that folder, or log it for the task 'sentence-embedding'."
        )
    return _model_class(folder, head, trust_remote_code).from_pretrained(
        str(folder), use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True
    )


def load_sentence_transformer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a SentenceTransformer from a local folder: safetensors only, its modules sentence-transformers' own."""
    check_weights(folder)
    check_modules_file(folder)
    return sentence_transformers().SentenceTransformer(
        str(folder),
        device="cpu",
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        model_kwargs={"use_safetensors": True},
    )


def sentence_transformers() -> Any:
    """Import sentence-transformers.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import sentence_transformers as library
    except ImportError:
        raise MissingDependencyError(
            "sentence-transformers",
            "A model in sentence-transformers format",
            "pip install 'mlflow-tdeploy[sentence-transformers]'",
        ) from None
    return library


def check_modules_file(folder: Path) -> None:
    """Refuse a chain with modules that cannot become a graph, before any of them is imported.

    Raises:
        InvalidInputError: ``modules.json`` is damaged or names such a module.
    """
    for entry in _modules(folder):
        check_sentence_module(*entry["type"].rpartition(".")[::2])


def _modules(folder: Path) -> list[dict[str, str]]:
    """Return type and path of every module; none for a bare transformers folder, which is pooled by the mean.

    Raises:
        InvalidInputError: ``modules.json`` is damaged.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    try:
        return [
            {"type": str(entry["type"]), "path": str(entry["path"])} for entry in json.loads(path.read_text("utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path.name} in '{folder.name}' is damaged ({error}). Save the model again."
        ) from error


def check_sentence_module(package: str, name: str) -> None:
    """Refuse a module of a SentenceTransformer that is not one of :data:`SENTENCE_MODULES`.

    Raises:
        InvalidInputError: It is another one, or not sentence-transformers' own.
    """
    if package.split(".")[0] != "sentence_transformers" or name not in SENTENCE_MODULES:
        raise InvalidInputError(
            f"The SentenceTransformer has the module '{package}.{name}', which cannot be exported: supported are "
            f"sentence-transformers' own {', '.join(SENTENCE_MODULES)}. Export it yourself and log the ONNX graph."
        )


def check_weights(folder: Path) -> None:
    """Make sure that loading the folder reads safetensors of this folder and nothing else.

    A sentence-transformers folder names the folders of its modules, the transformer's first: those are checked,
    whatever they are called. In the oldest ones the transformer lies in one of them, not at the top.

    Raises:
        NotFoundError: There is no ``config.json`` where the transformer should be.
        InvalidInputError: It has pickled weights only, is an adapter without its model, or names a folder outside.
        IntegrityError: A folder is a link that leads outside, or a weight file is damaged or incomplete.
    """
    places = [_module_folder(folder, entry["path"]) for entry in _modules(folder)] or [folder]
    transformer = places[0]
    where = "it" if transformer == folder else f"its folder '{transformer.name}'"
    if not (transformer / "config.json").is_file():
        raise NotFoundError(
            f"'{folder.name}' has no config.json in {where}: it is no folder of a Hugging Face model that is complete."
        )
    if (transformer / "adapter_config.json").exists():
        raise InvalidInputError(
            f"'{folder.name}' is a PEFT adapter. Merge it first: model.merge_and_unload().save_pretrained(folder)."
        )
    for place in places:
        _check_place(folder, place, needed=place == transformer)
        for file in sorted(place.glob("*.safetensors")):
            _check_whole(file)


def _check_whole(file: Path) -> None:
    """Read a weight file's header, which says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except SafetensorError as error:
        raise IntegrityError(
            f"'{file.name}' is damaged or incomplete: {error}. Copy or download the model again."
        ) from error


def _module_folder(folder: Path, relative: str) -> Path:
    """Return the folder of a module; an empty path is the model's own folder."""
    return safe_path(folder, relative.rstrip("/")) if relative else folder


def _check_place(folder: Path, place: Path, *, needed: bool) -> None:
    """Refuse a folder whose weights would be read from another file than safetensors.

    sentence-transformers takes ``pytorch_model.bin`` where there is no file of exactly the name ``model.safetensors``.
    """
    if any((place / name).is_file() for name in _SAFE):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in place.glob(pattern))
    weights = [name for name in pickles if not name.startswith(("training_args", "optimizer", "scheduler"))]
    if needed or weights:
        raise InvalidInputError(
            f"'{folder.name}' has no safetensors weights in {'it' if place == folder else place.name}"
            f"{f' (only {weights[0]})' if weights else ''}. Other formats are not read because loading them can "
            f"run code. Convert it where you trust it: "
            f"AutoModel.from_pretrained(old, use_safetensors=False).save_pretrained(new)."
        )


def _model_class(folder: Path, head: Head, trust_remote_code: bool) -> Any:
    """Return the class to load: the checkpoint's own where it is a bare model, else the automatic one."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    name = next(iter(config.architectures or []), "")
    if head.architecture:
        if not head.of(name):
            raise InvalidInputError(
                f"'{folder.name}' holds {name or 'a model without architecture'}, which is no '…{head.architecture}': "
                f"the head that the task needs would be random. Fine-tune it as one, or choose another task."
            )
        return getattr(transformers, head.auto_class)
    own = getattr(transformers, name, None) if head.of(name) else None
    return own if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel) else transformers.AutoModel
