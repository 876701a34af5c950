"""What a model's location holds that may be deployed: a bundle, an ONNX graph as MLflow logs it, a Triton model."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_tdeploy.core.errors import (
    BuildError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    TDeployError,
    first_line,
)
from mlflow_tdeploy.core.hardware import installed_version
from mlflow_tdeploy.registry_io import Location, open_records
from mlflow_tdeploy.registry_io.folder import MODEL, bring, content_of, flavors_of, listed, state_of
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.layout import ROOT
from mlflow_tdeploy.store.prune import used, views_home
from mlflow_tdeploy.store.staging import staged_directory, workspace
from mlflow_tdeploy.triton.names import CONFIG

if TYPE_CHECKING:
    from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, TensorSpec
    from mlflow_tdeploy.source.base import Source

#: What can be deployed, by the name of its flavor.
TDEPLOY, ONNX, TRITON = FLAVORS = ("tdeploy", "onnx", "triton")
_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class LoggedBundle:
    """A model that is logged as a bundle, or of whose ONNX graph one was made.

    Attributes:
        flavor: ``tdeploy`` or ``onnx``.
        bundle: Its records.
        fetch: What brings the files of a variant; None where they are here.
    """

    flavor: str
    bundle: Bundle
    fetch: Fetch | None = None


@dataclass(frozen=True)
class _Ranges:
    """Ranges that were said.

    Attributes:
        shapes: By dimension, or by input and axis.
        insist: Whether they were said of this graph; else those of others are left out.
    """

    shapes: Mapping[str, Any]
    insist: bool

    def of(self, signature: Signature) -> dict[str, Any]:
        """Return those that belong to a graph.

        Raises:
            InvalidInputError: They were said of this one, and do not.
        """
        places = {f"{spec.name}.{axis}" for spec in signature.inputs for axis in range(len(spec.shape))}
        known = {dim.name for dim in signature.dims} | places
        if unknown := [key for key in self.shapes if key not in known and self.insist]:
            raise InvalidInputError(
                f"shapes names '{unknown[0]}', which this graph has not: its dimensions are "
                f"{', '.join(dim.name for dim in signature.dims) or 'none'}."
            )
        return {key: value for key, value in self.shapes.items() if key in known}


@dataclass(frozen=True)
class ReadyFolder:
    """A model that is written for Triton.

    Attributes:
        folder: Its own folder, with its ``config.pbtxt``.
    """

    folder: Path
    flavor: str = TRITON


def find(
    location: Location, flavor: str, shapes: Mapping[str, Any], *, insist: bool = True
) -> LoggedBundle | ReadyFolder:
    """Return what a location holds.

    Args:
        location: The model.
        flavor: What to take it for; empty for what it is.
        shapes: Ranges of an ONNX graph's dimensions, which the graph itself does not say.
        insist: Whether they are refused where they belong to nothing; else they are left out.

    Raises:
        NotFoundError: It holds nothing that can be deployed, or not what it is to be taken for.
        InvalidInputError: The graph or the Triton model cannot be used, or the ranges do not belong to a graph.
    """
    missing: NotFoundError | None = None
    if flavor in ("", TDEPLOY):
        try:
            bundle, fetch = open_records(location, packaging=False)
        except NotFoundError as error:
            missing = error
        else:
            _refuse_shapes(insist and shapes, "A logged model has them")
            return LoggedBundle(TDEPLOY, bundle, fetch)
    files = listed(location)
    flavors = flavors_of(location, files)
    if missing and (flavor or TDEPLOY in flavors):
        raise missing  # it should have had one
    flavor = flavor or _flavor_of(location, files, flavors)
    if flavor == ONNX:
        return LoggedBundle(ONNX, _bundle_of_graph(location, files, flavors, _Ranges(shapes, insist)))
    _refuse_shapes(insist and shapes, f"A Triton model has them in its {CONFIG}")
    return ReadyFolder(_model_folder(location, files))


def _refuse_shapes(shapes: object, why: str) -> None:
    if shapes:
        raise InvalidInputError(f"shapes is for plain ONNX graphs. {why}: leave it out.")


def _flavor_of(location: Location, files: Mapping[str, str], flavors: Mapping[str, Any]) -> str:
    """Tell what files are.

    Raises:
        NotFoundError: They are nothing that can be deployed.
    """
    for one in (ONNX, TRITON):
        if one in flavors:
            return one
    if not flavors and _models(files):
        return TRITON
    if not flavors and _graphs(files):
        return ONNX
    having = f"It was logged with the flavors {', '.join(sorted(flavors))}" if flavors else "It has no MLmodel"
    raise NotFoundError(
        f"'{location.uri}' holds no bundle, no ONNX model and no Triton model. {having}: log it with "
        f"mlflow.tdeploy.log_model."
    )


def _graphs(files: Mapping[str, str]) -> list[str]:
    return sorted(name for name in files if name.endswith(".onnx") and "/" not in name)


def _above_number(path: PurePosixPath) -> list[PurePosixPath]:
    """Return the folder whose numbered version a file is of; at most one level down."""
    place = next((place for place, part in enumerate(path.parts[:-1][:2]) if part.isdecimal()), None)
    return [] if place is None else [PurePosixPath(*path.parts[:place])]


def _models(files: Mapping[str, str]) -> list[str]:
    """Return the folders that are Triton models, as they lie in a model's folder; ``.`` for that itself."""
    paths = [PurePosixPath(name) for name in files]
    found = {str(path.parent) for path in paths if path.name == CONFIG and len(path.parts) <= 2}
    numbered = {str(above) for path in paths for above in _above_number(path)}
    if "." in found & numbered:
        return ["."]  # whatever else it has is its own
    return sorted(found | numbered)


def _model_folder(location: Location, files: dict[str, str]) -> Path:
    """Return the folder of the only Triton model, on this host.

    Raises:
        NotFoundError: There is none.
        InvalidInputError: There are several: which of them answers would be a guess, and their names are in each other.
    """
    models = _models(files)
    if not models:
        raise NotFoundError(
            f"'{location.uri}' holds no Triton model: neither it nor a folder in it has a {CONFIG} or a numbered "
            f"version."
        )
    if len(models) > 1:
        raise InvalidInputError(
            f"'{location.uri}' holds the Triton models {', '.join(models)}, and a deployment is one of them: their "
            f"configurations name each other. Log each by itself."
        )
    if location.local is not None:
        return location.local / models[0]
    with workspace() as work:  # a store says no more of a file than its size: what it has now is fetched
        came = bring(location, work)
        return _kept(content_of(came), lambda fresh: shutil.copytree(came, fresh / MODEL)) / MODEL / models[0]


def _bundle_of_graph(location: Location, files: dict[str, str], flavors: Mapping[str, Any], ranges: _Ranges) -> Bundle:
    """Return a bundle of an ONNX graph as it is, which is made once on a host and found again.

    Raises:
        NotFoundError: There is no graph, or no telling which.
        InvalidInputError: It cannot be used.
    """
    graphs = [str(flavors[ONNX]["data"])] if flavors.get(ONNX, {}).get("data") else _graphs(files)
    if len(graphs) != 1 or graphs[0] not in files:
        raise NotFoundError(
            f"'{location.uri}' holds no ONNX model that could be deployed: there should be one graph, and there is "
            f"{', '.join(graphs) or 'none'}. Log it with mlflow.onnx.log_model, or better, mlflow.tdeploy.log_model."
        )

    if CONFIG in files:
        _log.warning(
            "The %s beside the graph is not used: how it is served follows from the graph and from -C. A model with "
            "its own is a Triton folder (config.pbtxt, 1/model.onnx), logged as artifacts.",
            CONFIG,
        )

    def make(fresh: Path) -> None:
        from mlflow_tdeploy.build.pipeline import BuildOptions, build_bundle
        from mlflow_tdeploy.store.writer import BundleDraft

        try:
            with contextlib.closing(_read(folder, graphs[0], ranges)) as graph:
                build_bundle(graph, BundleDraft(fresh / ROOT), BuildOptions(precisions=(), measure=False))
        except (BuildError, InvalidInputError) as error:
            raise type(error)(
                f"{error} (Of a plain graph: its ranges are said by -C shapes=…, its example by MLflow's "
                f"input_example; mlflow.tdeploy.log_model takes example= and verify_with= besides.)"
            ) from error

    how = [installed_version("mlflow-tdeploy") or "", graphs[0], repr(sorted(ranges.shapes.items()))]
    with workspace() as work:
        folder = bring(location, work)  # a store says no more of a file than its size: what it has now is fetched
        key = state_of(location, files, *how) if location.local is not None else content_of(folder, *how)
        bundle = Bundle.open(_kept(key, make))
    ranges.of(bundle.manifest.signature)  # it may have been made for others, which were left out
    return bundle


def _read(folder: Path, name: str, ranges: _Ranges) -> Source:
    """Read a graph, with the example that was logged with it where that is one of its requests."""
    from mlflow_tdeploy.source.resolve import resolve

    shapes = dict(ranges.shapes)
    if shapes and not ranges.insist:
        with contextlib.closing(resolve(folder / name, task="tensors")) as plain:
            shapes = ranges.of(plain.signature)
    graph = resolve(folder / name, task="tensors", shapes=shapes)
    example = _example(folder, graph.signature)
    if example is None:
        return graph
    graph.close()
    return resolve(folder / name, task="tensors", shapes=shapes, example=example)


def _example(folder: Path, signature: Signature) -> Arrays | None:
    """Return a request that was logged as MLflow's input example; None where there is none that the graph takes."""
    from mlflow.models import Model

    try:
        given: Any = Model.load(str(folder)).load_input_example(str(folder))
    except Exception as error:  # a file of MLflow's that is missing, damaged, or of a form of its own
        _log.debug("There is no example to try the graph with: %s", error)
        return None
    if given is None:
        return None
    only = signature.inputs[0].name
    if len(signature.inputs) == 1 and (not hasattr(given, "keys") or only not in given):
        given = {only: given.to_numpy() if hasattr(given, "to_numpy") else given}  # as mlflow.onnx passes a table on
    try:
        found = {spec.name: _first_rows(given[spec.name], spec, signature) for spec in signature.inputs}
        signature.bind(found)
    except (KeyError, TypeError, ValueError, TDeployError) as error:
        _log.warning("The graph is tried without the example that was logged with it: %r", first_line(error))
        return None
    return found


def _first_rows(given: Any, spec: TensorSpec, signature: Signature) -> Array:
    """Return an input of an example, of no more rows than the graph takes."""
    rows = spec.shape[0] if spec.shape else None
    most = signature.dim(rows).max if isinstance(rows, str) else None
    return np.asarray(list(given)[:most], spec.dtype)


def _kept(key: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of this host's cache, made where it is not there yet."""
    view = views_home() / key
    if not view.is_dir():
        try:
            with staged_directory(view) as fresh:
                make(fresh)
        except ConflictError:
            if not view.is_dir():
                raise  # else another process was as far
    used(view)
    return view
