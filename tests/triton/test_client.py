"""Over every way to talk to it, and where nobody or somebody else answers."""

from __future__ import annotations

import http.server
import socket
import sys
import threading

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import (
    InvalidInputError,
    LateError,
    MissingDependencyError,
    ServerError,
    UnreachableError,
)
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from mlflow_tdeploy.triton.repository import render
from tests.bundles import WEIGHTS, make_bundle
from tests.triton.deployables import deployable


@pytest.fixture(scope="module")
def triton(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    render(deployable(Bundle.open(make_bundle(folder / "model"))), folder / "repository")
    broken = folder / "repository" / "broken"
    broken.mkdir()
    (broken / "config.pbtxt").write_text('name: "broken" backend: "none" max_batch_size: 1')
    with local_triton(folder / "repository", server=server) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def client(request, triton):
    port = triton.http if request.param == "http" else triton.grpc
    return TritonClient(Connection(f"{request.param}://127.0.0.1:{port}"))


def test_a_model_is_loaded_asked_and_unloaded(client):
    assert client.live()
    client.require_live()
    assert not client.ready("m.v7")
    assert client.parameters("m.v7") is None
    client.load("m.v7")
    assert client.ready("m.v7")
    assert client.ready("m.v7", 7)
    assert not client.ready("m.v7", 6)
    assert client.parameters("m.v7")["tdeploy.variant"] == "onnx-fp32"
    states = {one.name: one.state for one in client.models()}
    assert states["m.v7"] == "READY"
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(client.infer("m.v7", {"x": x}, version=7)["y"], x @ WEIGHTS, rtol=1e-6)
    client.unload("m.v7")
    client.unload("m.v7")
    client.unload("never")


def test_what_the_log_says_besides_is_said_too(client, triton):
    said = iter(["an older error", "libcudart.so.12 is missing", "the same", "the same"])
    client._log = lambda: next(said)
    with pytest.raises(ServerError, match=r"cannot load 'broken': .* \(its log: libcudart.so.12 is missing\)"):
        client.load("broken")
    with pytest.raises(ServerError) as caught:
        client.load("broken")
    assert "its log" not in str(caught.value)
    client._log = triton.last_error
    with pytest.raises(ServerError, match="broken"):
        client.load("broken")


def test_what_the_server_refuses_is_said_in_its_words(client):
    with pytest.raises(ServerError, match="cannot load 'broken': .*broken"):
        client.load("broken")
    with pytest.raises(ServerError, match="cannot load 'none'"):
        client.load("none")
    client.load("m.v7")
    with pytest.raises((InvalidInputError, ServerError), match=r"cannot answer for 'm.v7': .*unexpected shape"):
        client.infer("m.v7", {"x": np.ones((2, 5), np.float32)})
    assert client.live()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_told_at_once(scheme):
    nobody = TritonClient(Connection(f"{scheme}://127.0.0.1:{free_port()}", timeout=3))
    assert not nobody.live()
    with pytest.raises(UnreachableError, match="nobody answers there"):
        nobody.require_live()
    with pytest.raises(UnreachableError, match="cannot load 'm': nobody answers"):
        nobody.load("m")


@pytest.mark.parametrize("given", ["http", "grpc"])
def test_the_port_of_the_other_protocol_is_told(triton, given):
    port = triton.grpc if given == "http" else triton.http
    with pytest.raises(UnreachableError):
        TritonClient(Connection(f"{given}://127.0.0.1:{port}", timeout=3)).models()


class Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        self.server.released.wait(10)

    do_POST = do_GET


@pytest.fixture
def silent():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.seen, server.released = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_says_nothing_is_not_waited_for_and_gets_the_token(silent):
    connection = Connection(f"http://127.0.0.1:{silent.server_port}", token="secret", timeout=0.5)
    with pytest.raises(LateError) as error:
        TritonClient(connection).load("m")
    assert "secret" not in str(error.value) + repr(connection)
    headers = {name.lower(): value for name, value in silent.seen[0].items()}
    assert headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://host:x", "http://host/v2", "http://u:pw@host"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InvalidInputError, match="server's address") as error:
        Connection(url)
    assert "pw" not in str(error.value) or "password" in str(error.value)


def test_ports_have_their_defaults():
    assert Connection("http://host").address == "host:8000"
    assert Connection("grpcs://host").address == "host:8001"
    assert Connection("grpcs://host").secure


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_missing_client_library_is_told_how_to_be_had(scheme, monkeypatch):
    for name in ("tritonclient", "tritonclient.http", "tritonclient.grpc", "tritonclient.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlflow-tdeploy\[triton\]'"):
        TritonClient(Connection(f"{scheme}://127.0.0.1:1")).live()


def test_a_dtype_that_triton_lacks_is_told(client):
    with pytest.raises(InvalidInputError, match="'x' is complex64, which Triton does not have"):
        client.infer("m.v7", {"x": np.ones((1, 4), np.complex64)})
