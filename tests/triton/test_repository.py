"""What is rendered, and what is refused before anything is written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, NoVariantError
from mlflow_tdeploy.core.open_task import open_task
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.config import own_parameters, parse
from mlflow_tdeploy.triton.library import library
from mlflow_tdeploy.triton.names import check_name, check_version, graph_of
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import render
from tests.bundles import WEIGHTS, make_bundle
from tests.flavor.text_bundles import make_text_bundle
from tests.pictures import opened, picture
from tests.triton.deployables import deployable


@pytest.fixture
def texts(tmp_path):
    return Bundle.open(make_text_bundle(tmp_path / "model", "text-classification"))


def files(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "library-" not in str(path)
    )


def test_render_writes_the_graph_and_the_front(texts, tmp_path):
    render(deployable(texts, model_uri="models:/m/7"), tmp_path / "out")
    assert files(tmp_path / "out") == [
        "m.v7/7/model.onnx", "m.v7/config.pbtxt", "m/7/assets/tokenizer.json", "m/7/front.json", "m/7/manifest.json",
        "m/7/model.py", "m/7/route.pbtxt", "m/config.pbtxt",
    ]  # fmt: skip
    graph = parse((tmp_path / "out/m.v7/config.pbtxt").read_text())
    found = own_parameters(graph)
    assert found["model_uri"] == "models:/m/7"
    assert (found["variant"], found["digest"]) == ("onnx-fp32", texts.variants["onnx-fp32"].digest)
    assert list(parse((tmp_path / "out/m/config.pbtxt").read_text()).version_policy.specific.versions) == [7]


def test_weights_of_the_cache_take_no_room_of_their_own_and_those_of_a_user_are_copied(texts, tmp_path, monkeypatch):
    """What a user may write to again must not change what is deployed."""
    render(deployable(texts), tmp_path / "out")
    graph = tmp_path / "out/m.v7/7/model.onnx"
    assert not os.path.samefile(graph, texts.path("files/onnx-fp32/model.onnx"))
    (lib,) = (tmp_path / "out/m").glob("library-*")
    assert os.path.samefile(next(lib.rglob("*.so")), next(library().rglob("*.so")))
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path))
    render(deployable(texts), tmp_path / "linked")
    assert os.path.samefile(tmp_path / "linked/m.v7/7/model.onnx", texts.path("files/onnx-fp32/model.onnx"))


def test_a_front_of_images_brings_pillow_for_servers_without(tmp_path):
    lib = library(("pillow",))
    assert not (library() / "pillow").exists()
    numpy = Path(np.__file__).parents[1]
    code = (
        f"import sys; sys.path[:] = [{str(lib)!r}, *[one for one in sys.path if 'site-packages' not in one]]\n"
        f"sys.path.append({str(lib / 'pillow')!r}); sys.path.append({str(tmp_path)!r})\n"
        "import PIL; from mlflow_tdeploy.core.images import pixels\n"
        "print(PIL.__file__); print(pixels(open(sys.argv[1], 'rb').read()).size)"
    )
    for name in ("numpy", "numpy.libs"):
        if (numpy / name).is_dir():
            (tmp_path / name).symlink_to(numpy / name)
    (tmp_path / "file").write_bytes(picture(3, ("JPEG", "RGB", {})))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    where, size = done.stdout.splitlines() or [done.stderr, ""]
    assert where.startswith(str(lib / "pillow"))
    assert size == str(opened(picture(3, ("JPEG", "RGB", {}))).size)


def test_golden_requests_become_warmup(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "model"))
    render(deployable(bundle), tmp_path / "out")
    (sample,) = parse((tmp_path / "out/m.v7/config.pbtxt").read_text()).model_warmup
    assert (sample.batch_size, list(sample.inputs["x"].dims)) == (1, [4])
    written = tmp_path / "out/m.v7/warmup" / sample.inputs["x"].input_data_file
    np.testing.assert_array_equal(np.fromfile(written, np.float32), [1, 2, 3, 4])
    render(deployable(bundle), tmp_path / "cold", TritonOptions(warmup=False))
    assert not (tmp_path / "cold/m.v7/warmup").exists()


def test_rows_of_dynamic_ranges_are_joined_for_texts_only(texts, tmp_path):
    """Rows of somebody else that are a hundred times as large would leave mine nothing of eight bits."""
    plain = deployable(Bundle.open(make_bundle(tmp_path / "plain")))

    def joins(what, **settings):
        precision = Precision("int8", "int8", "ort-cpu-int8", settings=settings)
        return dataclasses.replace(what, variant=dataclasses.replace(what.variant, precision=precision)).joins

    assert plain.joins
    assert [joins(plain, dynamic=True), joins(plain), joins(plain, dynamic=False)] == [False, False, True]
    assert joins(deployable(texts), dynamic=True)


def test_a_front_does_not_open_assets_that_were_changed(texts, tmp_path):
    render(deployable(texts), tmp_path / "out")
    assert open_task(tmp_path / "out/m/7").name == "text-classification"
    path = tmp_path / "out/m/7/assets/tokenizer.json"
    content = path.read_text()
    path.unlink()
    path.write_text(content.replace("cat", "cow"))
    with pytest.raises(IntegrityError, match="tokenizer.json' of this version was changed"):
        open_task(tmp_path / "out/m/7")
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_task(tmp_path / "out/m/7")


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "a..b", ".hidden", "m.v7", "a b", "é", "a" * 129, "m.", "m.check", "m.v7.check", None]
)
def test_a_name_that_no_folder_or_version_may_have_is_refused(texts, tmp_path, name):
    with pytest.raises(InvalidInputError, match="Invalid deployment name"):
        render(dataclasses.replace(deployable(texts), name=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["m", "bert-large_2", "a.b", "m.v0", "m.v", "V7"])
def test_other_names_are_fine(name):
    assert check_name(name) == name


@pytest.mark.parametrize("version", [0, -1, True, "7", 2**63, 1.0])
def test_a_version_that_triton_cannot_have_is_refused(version):
    with pytest.raises(InvalidInputError, match="whole number from 1 on"):
        check_version(version)


def test_graph_of_tells_what_a_triton_model_is_by_its_name():
    assert graph_of("bert.v2.v12") == ("bert.v2", 12)
    assert graph_of("bert") is graph_of("bert.v0") is None


def test_nothing_is_written_when_something_is_wrong(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other").touch()
    with pytest.raises(ConflictError):
        render(deployable(texts), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]
    texts.path("files/onnx-fp32/model.onnx").write_bytes(b"another")
    with pytest.raises(IntegrityError):
        render(deployable(texts), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_variants_that_triton_cannot_serve_are_refused(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "model", {"onnx-fp32": WEIGHTS}))
    what = deployable(bundle)
    with pytest.raises(NoVariantError, match="over its budget"):
        render(dataclasses.replace(what, variant=dataclasses.replace(what.variant, files=())), tmp_path / "out")
    with pytest.raises(NoVariantError, match="takes its weights from another graph"):
        render(
            dataclasses.replace(what, variant=dataclasses.replace(what.variant, shared=what.variant.files)),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_what_a_front_carries_runs_in_the_python_of_a_stock_triton():
    """NVIDIA's images have had Python 3.10 until 24.10, and 3.12 since."""
    root = Path(mlflow_tdeploy.__file__).parent
    command = [shutil.which("vermin") or str(Path(sys.executable).parent / "vermin"), "-t=3.10-", "--violations"]
    done = subprocess.run(
        [*command, *(root / "triton" / one for one in ("front", "probe")), root / "core"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
