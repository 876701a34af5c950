"""A version that is a Triton model already: files and configuration as they are, an ensemble of one step in front."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, NotFoundError
from mlflow_tdeploy.store.disk import link_own_or_copy
from mlflow_tdeploy.store.hashing import record_file
from mlflow_tdeploy.triton.config import OWN, messages, parse, to_text
from mlflow_tdeploy.triton.names import CONFIG, FACTS, ROUTED
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import Deployable

#: What a client has to know to ask it, as for the task ``tensors``.
_TENSORS = {"task": "tensors", "takes": "tensors", "answers": "tensors"}
#: Stands in a folder that is empty, which a store of objects has not.
_KEEP = ".keep"
#: What a backend, or a platform of old, opens in a version where the configuration names no file.
_OPENED = {
    "python": "model.py", "onnxruntime": "model.onnx", "onnxruntime_onnx": "model.onnx", "tensorrt": "model.plan",
    "tensorrt_plan": "model.plan", "pytorch_libtorch": "model.pt",
}  # fmt: skip


@dataclass(frozen=True)
class ReadyVersion(Deployable):
    """A version of a model that somebody has written for Triton.

    In front of it there is an ensemble of this one step (``ensemble_scheduling`` of the ModelConfig), which takes and
    answers what the model does, of any type; nothing of ours runs. No golden requests belong to it: it is switched to
    once the server has loaded it, with its own ``model_warmup``.

    Attributes:
        folder: The model's folder: ``config.pbtxt``, numbered versions, and whatever else it has.
    """

    folder: Path

    def made_of(self, options: TritonOptions) -> str:
        """Return the hashes of its files."""
        self._config(options)
        return self._hashes

    def write_graph(self, folder: Path, options: TritonOptions) -> None:
        """Write its newest version as ours, with its own configuration."""
        for name, source in self._files().items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_own_or_copy(self.folder / source, target)
        for empty in self._empty():
            (folder / empty).mkdir(parents=True)
            (folder / empty / _KEEP).touch()
        config = self._config(options)
        config.name = self.graph_name
        config.version_policy.specific.versions.append(self.version)
        for name, value in sorted(self.about.items()):
            config.parameters[f"{OWN}{name}"].string_value = value
        (folder / CONFIG).write_text(to_text(config))

    def write_front(self, folder: Path, options: TritonOptions) -> None:
        """Write what belongs to the route: an ensemble has no files."""
        own = folder / str(self.version)
        own.mkdir(parents=True)
        (own / FACTS).write_text(json.dumps({"graph": self.graph_name}) + "\n")
        (own / ROUTED).write_text(self.route_text(options))

    def route_text(self, options: TritonOptions) -> str:
        """Return the configuration of an ensemble of one step."""
        pb, config = messages(), self._config(options)
        front = pb.ModelConfig(name=self.name, platform="ensemble", max_batch_size=config.max_batch_size)
        front.version_policy.specific.versions.append(self.version)
        for one in config.input:
            front.input.add(name=one.name, data_type=one.data_type, dims=one.dims, optional=one.optional)
        for one in config.output:
            front.output.add(name=one.name, data_type=one.data_type, dims=one.dims)
        front.model_transaction_policy.decoupled = config.model_transaction_policy.decoupled
        step = front.ensemble_scheduling.step.add(model_name=self.graph_name, model_version=self.version)
        for one in config.input:
            step.input_map[one.name] = one.name
        for one in config.output:
            step.output_map[one.name] = one.name
        for name, value in _TENSORS.items():
            front.parameters[f"{OWN}{name}"].string_value = value
        return to_text(front)

    @functools.cached_property
    def _hashes(self) -> str:
        records = [record_file(self.folder, name) for name in (*self._files().values(), CONFIG)]
        return "\n".join(f"{one.path} {one.sha256}" for one in records)

    def _config(self, options: TritonOptions) -> Any:
        """Return its configuration, without what says which version it is.

        Raises:
            NotFoundError: There is none, or the file that its backend opens is not there.
            InvalidInputError: It is damaged or says too little, or options are to change it.
        """
        if options != TritonOptions():
            raise InvalidInputError(
                f"A Triton model is served as its {CONFIG} says: say there how, and leave options of serving out here."
            )
        config = self._parsed()
        if not config.input or not config.output:
            raise InvalidInputError(
                f"The {CONFIG} in '{self.folder}' does not say inputs and outputs. A server that has loaded the model "
                f"shows them under v2/models/NAME/config: write them there."
            )
        if both := {one.name for one in config.input} & {one.name for one in config.output}:
            raise InvalidInputError(
                f"The Triton model in '{self.folder}' takes and answers '{min(both)}' under one name, which no "
                f"ensemble in front of it can: its tensors have a name each. Call one of them otherwise."
            )
        self._require_file(config)
        config.ClearField("version_policy")
        for name in [one for one in config.parameters if one.startswith(OWN)]:
            del config.parameters[name]
        return config

    def _parsed(self) -> Any:
        """Return its configuration.

        Raises:
            NotFoundError: There is none.
            InvalidInputError: It is damaged.
        """
        try:
            return parse((self.folder / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFoundError(
                f"'{self.folder}' has no {CONFIG}, so what it takes is not known. A server that has loaded it shows "
                f"one under v2/models/NAME/config: log that with the model."
            ) from error
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"The {CONFIG} in '{self.folder}' is no text: {error}.") from error

    def _files(self) -> dict[str, str]:
        """Return its files: how each is called as a version of ours, and how it is called there.

        Raises:
            NotFoundError: It has no version.
            IntegrityError: There is a link in it: where that leads is not the model's to say.
        """
        newest, found = self._newest(), dict[str, str]()
        for current, folders, names in os.walk(self.folder):
            for path in (Path(current, name) for name in (*folders, *names)):
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise IntegrityError(f"'{path}' is a link or no plain file. Put the file itself there.")
            there = [Path(current, name).relative_to(self.folder) for name in names]
            found |= {self._place(path, newest): path.as_posix() for path in there if path.as_posix() != CONFIG}
        found.pop("", None)
        return found

    def _empty(self) -> list[str]:
        """Return its empty folders, as they are called as a version of ours."""
        newest = self._newest()
        empty = [Path(current).relative_to(self.folder) for current, *below in os.walk(self.folder) if not any(below)]
        return [place for place in (self._place(path, newest) for path in empty) if place]

    def _newest(self) -> int:
        """Return the version that its own server would serve: the newest of those that its policy names, if it does."""
        numbers = [int(one.name) for one in self.folder.iterdir() if one.is_dir() and one.name.isdecimal()]
        named = {*self._parsed().version_policy.specific.versions}
        if not numbers:
            raise NotFoundError(f"'{self.folder}' has no numbered folder with a version of the model.")
        if named and not named & {*numbers}:
            raise NotFoundError(f"'{self.folder}' has no version that its version_policy names: {min(named)}.")
        return max(one for one in numbers if not named or one in named)

    def _require_file(self, config: Any) -> None:
        """Make sure that what the backend opens is there: Triton's Python backend waits for ever for one that is not.

        Raises:
            NotFoundError: It is not.
        """
        usual = next((name for kind, name in _OPENED.items() if kind in (config.backend, config.platform)), "")
        name = config.default_model_filename or usual
        if name and not config.cc_model_filenames and not (self.folder / str(self._newest()) / name).exists():
            raise NotFoundError(
                f"The Triton model in '{self.folder}' has no '{name}' in version {self._newest()}, which the backend "
                f"{config.backend or config.platform} opens."
            )

    def _place(self, path: Path, newest: int) -> str:
        """Return where something lies in a version of ours; empty for other versions: the newest is deployed."""
        if not path.parts[0].isdecimal():
            return path.as_posix()
        return Path(str(self.version), *path.parts[1:]).as_posix() if int(path.parts[0]) == newest else ""
