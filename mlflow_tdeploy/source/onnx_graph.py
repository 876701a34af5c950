"""Ready-made ONNX graphs: one, or several precisions of the same model."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, TDeployError, first_line
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tasks import TASKS, heads
from mlflow_tdeploy.core.tasks._image import INPUT
from mlflow_tdeploy.core.tensors import Arrays, Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import check_variant_id
from mlflow_tdeploy.source._image_graph import image_signature
from mlflow_tdeploy.source._image_processor import check_image_parity, image_heads, open_processor, processor_settings
from mlflow_tdeploy.source._onnx_signature import (
    PRECISIONS,
    GraphFacts,
    axis_name,
    default_dims,
    read_graph,
    write_proto,
)
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._padding import settle_padding
from mlflow_tdeploy.source._positions import integer_positions, missing_values
from mlflow_tdeploy.source._shaken_graph import ShakenGraph
from mlflow_tdeploy.source._shapes import check_shapes, make_dims
from mlflow_tdeploy.source._survival import deadly
from mlflow_tdeploy.source._tokenizer import (
    check_parity,
    check_tokenizer,
    encode_with,
    task_tokens,
    text_dims,
    token_limit,
    tokenizer_settings,
    write_tokenizer,
)
from mlflow_tdeploy.source.base import Source

TASK = "tensors"
#: What mlflow.transformers takes a mapping of.
_PARTS = ("model", "tokenizer", "image_processor", "feature_extractor", "processor")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class OnnxSource(Source):
    """Graphs as they are; the most exact one is the reference.

    Attributes:
        reference_id: Variant id of the graph that :meth:`reference` runs.
    """

    reference_id: str

    def __init__(
        self, record: SourceRecord, graphs: Mapping[str, GraphFacts], reference_id: str, temporary: Path
    ) -> None:
        self.record = record
        self.reference_id = reference_id
        self._graphs = {name: facts.path for name, facts in graphs.items()}
        self._clean = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        self._repositories: dict[str, Path] = {}
        self._tokenizer: Any = None
        self._session: Any = None
        self._shaken: ShakenGraph | None = None

    @property
    def repositories(self) -> Mapping[str, Path]:
        """Folders that were given beside the graphs."""
        return self._repositories

    @property
    def graphs(self) -> Mapping[str, Path]:
        """The graphs' files by variant id, the reference first."""
        return self._graphs

    def session(self) -> Any:
        """Return ONNX Runtime's session of the reference graph, opened once.

        Raises:
            InvalidInputError: ONNX Runtime cannot open the graph.
            MissingDependencyError: It is not installed.
        """
        if self._session is None:
            self._session = _open(self._graphs[self.reference_id])
        return self._session

    def reference(self, feeds: Arrays) -> Arrays:
        """Run the reference graph on the CPU."""
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self.session().run(names, feeds), strict=True))

    def shaken(self, feeds: Arrays, seed: int) -> Arrays:
        """Run the reference graph with every node's results off by as much as rounding might be."""
        if self._shaken is None:
            names = [spec.name for spec in self.signature.outputs]
            self._shaken = ShakenGraph(self._graphs[self.reference_id], names)
        return self._shaken(feeds, seed)

    def write_assets(self, folder: Path) -> None:
        """Write the tokenizer of a text task."""
        if self._tokenizer is not None:
            write_tokenizer(self._tokenizer, folder)

    def close(self) -> None:
        """Close the session and remove graphs that were in memory."""
        self._session = self._shaken = None
        self._clean()

    def set_tensors(self, facts: GraphFacts, options: Options) -> None:
        """Read task and signature for arrays in, arrays out."""
        options.refuse("task 'tensors'", "tokenizer", "labels", "image_processor")
        dims = make_dims(default_dims(facts.inputs), options.shapes)
        ranges = {spec.name: facts.tables[spec.name] for spec in facts.inputs if spec.name in facts.tables}
        self.signature = Signature(dims, facts.inputs, self._outputs(facts))
        if options.example is not None:
            self.signature.bind(options.example)
        self.task, self.task_config = TASK, ({"integer_ranges": ranges} if ranges else {})
        if options.example is not None:
            example = dict(options.example)
            self.examples = (example,)
            self._probe(example)
            self.task_config |= integer_positions(self.signature, example, self.reference, ranges)
            self.task_config |= missing_values(example)

    def set_images(self, facts: GraphFacts, options: Options, task: str) -> None:
        """Read task and signature for a graph that takes the pixels of images."""
        options.refuse("a model of images", "example", "tokenizer")
        processor = open_processor(options.image_processor)
        self.task, self.task_config = task, processor_settings(processor)
        shape = tuple(self.task_config.get("crop") or self.task_config["size"])
        outputs = {spec.name: spec for spec in self._outputs(facts)}
        self.signature = image_signature(task, facts.inputs, outputs, shape, options)
        rows = self.signature.dims[0].min if self.signature.dims else int(facts.inputs[0].shape[0])
        got = self._probe({INPUT: np.zeros((rows, 3, *shape), np.float32)})
        self.signature = dataclasses.replace(
            self.signature,
            outputs=tuple(
                dataclasses.replace(one, shape=(one.shape[0], *map(int, got[one.name].shape[1:])))
                for one in self.signature.outputs
            ),
        )
        width = int(got[heads()[task].output].shape[-1])
        self.task_config |= TASKS.get(task).settings_of({}, width, options.labels, {})
        check_image_parity(task, self.task_config, self.signature, processor)

    def set_text(self, facts: GraphFacts, options: Options, task: str) -> None:
        """Read task and signature for a graph that takes token ids."""
        options.refuse("a text model", "example", "image_processor")
        head, tokenizer = heads()[task], check_tokenizer(options.tokenizer, task)
        inputs, renamed = _text_inputs(facts, task)
        found = {spec.name: spec for spec in self._outputs(facts)}
        if lacking := [name for name in head.outputs if name not in found]:
            raise InvalidInputError(
                f"Task '{task}' needs a graph output named '{lacking[0]}'; this graph has {', '.join(found)}. Rename "
                f"it, or log the graph with task='tensors'."
            )
        width = inputs[0].shape[1]
        longest = token_limit(tokenizer, width if isinstance(width, int) else None)
        dims = _text_ranges(inputs[0], tokenizer, longest, options)
        outputs = [
            dataclasses.replace(found[name], shape=tuple(renamed.get(size, size) for size in found[name].shape))
            for name in head.outputs
        ]
        self.task, self._tokenizer = task, tokenizer
        self.task_config = tokenizer_settings(tokenizer, longest) | task_tokens(task, tokenizer)
        self.signature = Signature(dims, inputs, tuple(outputs))
        size = 0
        if head.wide:
            got = self._probe(_token_feeds(self.signature, tokenizer))
            size = got[head.output].shape[-1]
            outputs = [dataclasses.replace(one, shape=(*one.shape[:-1], got[one.name].shape[-1])) for one in outputs]
            self.signature = Signature(dims, inputs, tuple(outputs))
        self.task_config |= TASKS.get(task).settings_of({}, size, options.labels, {})
        self.signature, self.task_config = settle_padding(
            lambda _, feeds: self._probe(feeds), task, self.task_config, self.signature, tokenizer, set()
        )
        check_parity(task, self.task_config, self.signature, tokenizer, encode_with(tokenizer, longest))

    def _outputs(self, facts: GraphFacts) -> tuple[TensorSpec, ...]:
        """Return the outputs; shapes that the graph does not write are ONNX Runtime's."""
        if not facts.shapeless:
            return facts.outputs
        inferred = {node.name: node.shape for node in self.session().get_outputs()}
        found = [
            TensorSpec(
                name, dtype, tuple(axis_name(name, axis, size) for axis, size in enumerate(inferred[name] or ()))
            )
            for name, dtype in facts.shapeless
        ]
        return (*facts.outputs, *found)

    def _probe(self, feeds: Arrays) -> Arrays:
        try:
            return self.reference(feeds)
        except TDeployError:
            raise
        except Exception as error:  # onnxruntime's classes share no base of their own
            raise InvalidInputError(f"The graph fails on its example inputs: {first_line(error)}") from error


def from_graphs(model: Any, options: Options) -> OnnxSource:
    """Read one graph (path or ModelProto) or a mapping from variant id to graph; a folder is a Triton repository.

    Raises:
        InvalidInputError: The graphs differ in their inputs or outputs, or do not fit the task.
        NotFoundError: A file is missing.
        IntegrityError: A file is no ONNX graph.
    """
    temporary = Path(tempfile.mkdtemp(prefix="tdeploy-onnx-"))
    try:
        folders = _folders(model)
        found = _read(model, folders, temporary)
        graphs = dict(sorted(found.items(), key=lambda item: PRECISIONS.index(item[1].precision)))
        reference_id = next(iter(graphs))
        facts = graphs[reference_id]
        for name, other in graphs.items():
            _check_alike(reference_id, facts, name, other)
        stem = facts.path.stem if temporary not in facts.path.parents else "graph"
        source = OnnxSource(SourceRecord("onnx", stem, None, ""), graphs, reference_id, temporary)
        source._repositories = folders
        task = options.task or _infer_task(facts, options)
        if task in image_heads():
            source.set_images(facts, options, task)
        elif task in heads():
            source.set_text(facts, options, task)
        else:
            source.set_tensors(facts, options)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return source


def _folders(model: Any) -> dict[str, Path]:
    """Return what of a mapping are folders, by variant id."""
    if not isinstance(model, Mapping):
        return {}
    paths = {name: Path(value).expanduser() for name, value in model.items() if isinstance(value, (str, Path))}
    return {check_variant_id(name): path for name, path in paths.items() if path.is_dir()}


def _read(model: Any, folders: Mapping[str, Path], temporary: Path) -> dict[str, GraphFacts]:
    if not isinstance(model, Mapping):
        facts = _read_one("graph", model, temporary)
        return {facts.variant_id: facts}
    if not model:
        raise InvalidInputError("The mapping of ready-made variants is empty. Give at least one ONNX graph.")
    graphs = {name: graph for name, graph in model.items() if name not in folders}
    if "hf" in model:
        raise InvalidInputError("The id 'hf' is that of an original model of Hugging Face: choose another one.")
    if not graphs:
        raise InvalidInputError(
            "A Triton repository is kept beside an ONNX graph of the same model, which says what it takes and answers. "
            "Give that, too."
        )
    return {check_variant_id(name): _read_one(name, graph, temporary) for name, graph in graphs.items()}


def _read_one(name: str, graph: Any, temporary: Path) -> GraphFacts:
    if isinstance(graph, (str, Path)):
        return read_graph(Path(graph).expanduser())
    if type(graph).__name__ != "ModelProto":
        mend = " Pass the model itself, and tokenizer=… beside it." if name in _PARTS else ""
        raise InvalidInputError(
            f"Variant '{name}' must be an ONNX path or ModelProto, got {type(graph).__name__}.{mend}"
        )
    path = temporary / name / "model.onnx"
    path.parent.mkdir()
    write_proto(graph, path)
    return read_graph(path)


def _infer_task(facts: GraphFacts, options: Options) -> str:
    if options.image_processor is not None:
        names = {spec.name for spec in facts.outputs} | {name for name, _ in facts.shapeless}
        fitting = [task for task, head in image_heads().items() if head.output in names]
        if not fitting:
            raise InvalidInputError(
                f"No task is known for a graph of images with the outputs {', '.join(sorted(names))}: "
                f"{', '.join(f'{task} has {head.output}' for task, head in image_heads().items())}. Rename it."
            )
        return fitting[0]
    if options.tokenizer is None:
        return TASK
    ranks = {spec.name: len(spec.shape) for spec in facts.outputs} | {name: None for name, _ in facts.shapeless}
    fitting = [task for task, head in heads().items() if head.told and head.fits(ranks)]
    return next(iter(fitting), TASK)


def _check_alike(reference_id: str, reference: GraphFacts, name: str, other: GraphFacts) -> None:
    """Make sure that a variant takes and returns what the reference does; dtypes may differ."""
    pairs = (("input", reference.inputs, other.inputs), ("output", reference.outputs, other.outputs))
    for kind, expected, got in pairs:
        mine = {spec.name: spec for spec in got}
        if set(mine) != {spec.name for spec in expected}:
            raise InvalidInputError(
                f"Variant '{name}' has the {kind}s {', '.join(sorted(mine))}; '{reference_id}' has "
                f"{', '.join(sorted(spec.name for spec in expected))}. Variants of one model must agree."
            )
        for spec in expected:
            fixed = [
                (a, b) for a, b in zip(spec.shape, mine[spec.name].shape, strict=False) if {type(a), type(b)} == {int}
            ]
            if len(spec.shape) != len(mine[spec.name].shape) or any(a != b for a, b in fixed):
                raise InvalidInputError(
                    f"Variant '{name}' has the {kind} {mine[spec.name]}; '{reference_id}' has {spec}. "
                    f"Variants of one model must agree."
                )


def _text_inputs(facts: GraphFacts, task: str) -> tuple[tuple[TensorSpec, ...], dict[str | int, str]]:
    """Return the inputs with their axes called batch and sequence, and what these were called."""
    renamed: dict[str | int, str] = {}
    inputs = []
    for spec in facts.inputs:
        if spec.name not in _TEXT_INPUTS or len(spec.shape) != 2 or spec.dtype not in ("int64", "int32"):
            raise InvalidInputError(
                f"Task '{task}' cannot fill the graph input {spec}: text graphs take {', '.join(_TEXT_INPUTS)} as "
                f"integers [batch, sequence]. Log it with task='tensors'."
            )
        shape = tuple(
            size if isinstance(size, int) else renamed.setdefault(size, name)
            for size, name in zip(spec.shape, ("batch", "sequence"), strict=True)
        )
        inputs.append(TensorSpec(spec.name, spec.dtype, shape))
    if "input_ids" not in {spec.name for spec in inputs}:
        raise InvalidInputError(f"Task '{task}' needs a graph input 'input_ids'. Log it with task='tensors'.")
    return tuple(inputs), renamed


def _text_ranges(spec: TensorSpec, tokenizer: Any, longest: int, options: Options) -> tuple[Dim, ...]:
    free = [size for size in spec.shape if isinstance(size, str)]
    for name in check_shapes(options.shapes):
        if name in ("batch", "sequence") and name not in free:
            raise InvalidInputError(f"shapes names '{name}', which is fixed in the graph: {spec}.")
    return tuple(dim for dim in text_dims(tokenizer, longest, None, options.shapes) if dim.name in free)


def _token_feeds(signature: Signature, tokenizer: Any) -> Arrays:
    """Return the graph's inputs for one short text at the smallest allowed batch."""
    batch, width = (size if isinstance(size, int) else signature.dim(size).min for size in signature.inputs[0].shape)
    longest = signature.inputs[0].shape[1]
    most = longest if isinstance(longest, int) else signature.dim(longest).max
    ids = tokenizer("A short text.", truncation=True, max_length=most)["input_ids"]
    width = max(width, len(ids))
    rows = {"attention_mask": [1] * len(ids), "input_ids": ids, "position_ids": list(range(len(ids)))}
    return {
        spec.name: np.array(
            [rows.get(spec.name, []) + [0] * (width - len(rows.get(spec.name, [])))] * batch, spec.dtype
        )
        for spec in signature.inputs
    }


def _open(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime", "The reference of an ONNX graph", "pip install 'mlflow-tdeploy[cpu]'"
        ) from None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        if end := deadly(path):
            raise InvalidInputError(
                f"ONNX Runtime {onnxruntime.__version__} does not survive opening '{path.name}' ({end}). Log the graph "
                f"in single precision: the variants of lower precision are made and checked from it."
            )
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except InvalidInputError:
        raise
    except Exception as error:  # onnxruntime's classes share no base of their own
        raise InvalidInputError(f"ONNX Runtime cannot open '{path.name}': {first_line(error)}") from error
