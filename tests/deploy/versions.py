"""Versions of small models to deploy, and what a test asks of a server about them."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import numpy as np

from mlflow_tdeploy.core.golden import GoldenRequest, dump
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.deploy.apply import Deployments, Settings
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_file
from tests.bundles import WEIGHTS, linear_graph, make_bundle
from tests.triton.deployables import deployable

QUICK = Settings(grace=0.0)
X = np.array([[1, 2, 3, 4], [0, 1, 0, 1]], np.float32)


def linear(tmp_path, version, factor=1.0, **more):
    """Return version ``version`` of a model that is ``factor`` times another one."""
    root = tmp_path / f"model-{version}"
    if not root.exists():
        make_bundle(root, {"onnx-fp32": WEIGHTS})
        bundle = Bundle.open(root)
        scale(bundle, factor)
    return deployable(Bundle.open(root), version=version, **more)


def scale(bundle, factor):
    """Make another model of a bundle: graph and golden answers."""
    x = np.array([[1, 2, 3, 4]], np.float32)
    y = x @ (WEIGHTS * np.float32(factor))
    text, npz = dump((GoldenRequest({"x": x}, {"x": x}, {"y": y}, {"y": y}),))
    paths = [file.path for file in bundle.manifest.golden]
    for path, content in zip(sorted(paths), (text.encode(), npz), strict=True):
        bundle.path(path).write_bytes(content)
    golden = tuple(record_file(bundle.root, path) for path in paths)
    (bundle.root / "manifest.json").write_text(to_json(dataclasses.replace(bundle.manifest, golden=golden)))
    linear_graph(bundle.root / "files/onnx-fp32/model.onnx", WEIGHTS * np.float32(factor))
    variant = bundle.variants["onnx-fp32"]
    files = tuple(record_file(bundle.root, file.path) for file in variant.files)
    (bundle.root / "variants/onnx-fp32.json").write_text(to_json(dataclasses.replace(variant, files=files)))


def factor(target, name="m", version=None):
    """Return which model answers."""
    got = target.client.infer(name, {"x": X}, version=version)["y"]
    ratio = got / (X @ WEIGHTS)
    assert np.allclose(ratio, ratio[0, 0], rtol=1e-4)
    return round(float(ratio[0, 0]), 3)


def there(target):
    """Return what lies in the repository and what is loaded."""
    folders = {name: sorted(os.listdir(target.files.root / name)) for name in target.files.models()}
    ready = {one.name for one in target.client.models() if one.state == "READY"}
    return {name: [one for one in found if not one.startswith("library-")] for name, found in folders.items()}, ready


def changed_weights(what):
    """Make the graph another one than its golden answers are of, and its record fit it."""
    path = what.bundle.path(what.variant.entry)
    path.unlink()
    linear_graph(path, -WEIGHTS)
    files = (record_file(what.bundle.root, what.variant.entry),)
    return dataclasses.replace(what, variant=dataclasses.replace(what.variant, files=files))


def no_graph(what):

    path = what.bundle.path(what.variant.entry)
    path.write_bytes(b"no graph")
    files = (record_file(what.bundle.root, what.variant.entry),)
    return dataclasses.replace(what, variant=dataclasses.replace(what.variant, files=files))


class Killed(BaseException):
    pass


STEPS = ("graph", "verify", "front", "answers", "switch", "retire")


def killed_at(target, step):
    """Return the same deployments, ended as by a kill before a step: nothing is taken back by who is killed."""

    def stop(reached):
        if reached == step:
            raise Killed

    killed = Deployments(target.client, target.files, on_step=stop)
    killed._undone = lambda *_, **__: contextlib.nullcontext()
    return killed
