"""The clients of the Triton benchmark, and how its figures come about."""

from __future__ import annotations

import http.server
import sys
import threading
from types import SimpleNamespace

import pytest

from benchmarks import perf_analyzer
from benchmarks.load import run
from benchmarks.triton import CLIENTS, INT8, _load_figures, _version
from benchmarks.triton_layouts import write_transformer_deploy
from tests.flavor.text_bundles import make_text_bundle


class Every(http.server.BaseHTTPRequestHandler):
    """Refuses each third request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.count += 1
        self.send_response(500 if self.server.count % 3 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_load_counts_what_was_answered_and_what_was_refused():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Every)
    server.count = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = run(
            {"port": server.server_port, "path": "/", "bodies": ["a", "b"], "headers": {}, "clients": 2, "seconds": 0.5}
        )
    finally:
        server.shutdown()
        server.server_close()
    assert found["requests"] + found["failures"] == server.count
    assert found["failures"] == server.count // 3
    assert found["requests_per_s"] == found["requests"] / 0.5
    assert "500" in found["first_failure"][0]


def test_figures_are_ratios_of_rates_and_a_failure_is_a_missed_goal():
    def loads(rate, failures=0):
        return {
            clients: {"requests_per_s": rate, "p50_ms": 1.0, "p99_ms": 2.0, "failures": failures} for clients in CLIENTS
        }

    found = {
        "ours on Triton": loads(30.0), "layout of transformer-deploy": loads(10.0, failures=1),
        "ours on Triton, int8": loads(60.0), "mlflow models serve, sentence_transformers": loads(15.0),
    }  # fmt: skip
    floor = {"ours_p50_ms": 6.0, "bare_ms": 4.0, "hop_ms": 0.5, "floor_ms": 5.0}
    figures = {figure.name: figure for figure in _load_figures(found, floor)}
    values = [figure.value for figure in list(figures.values())[:5]]
    assert values == pytest.approx([3.0, 2.0, 1.2, 6.0, 4.0])
    assert figures["requests that failed under load"].value == 3
    assert figures["requests that failed under load"].met is False


def test_what_is_deployed_is_the_variant_to_compare(tmp_path):
    what, settings = _version(make_text_bundle(tmp_path / "model"), 2, INT8)
    assert (what.name, what.version, what.variant.id) == ("minilm", 2, INT8)
    assert settings.options.instances >= 1


def test_the_layout_to_compare_with_batches_nothing(tmp_path):
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    (tmp_path / "tokenizer.json").touch()
    models = write_transformer_deploy(tmp_path / "out", tmp_path / "graph" / "model.onnx", tmp_path / "tokenizer.json")
    configs = [(tmp_path / "out" / model / "config.pbtxt").read_text() for model in models]
    assert all("max_batch_size: 0" in text and "dynamic_batching" not in text for text in configs)


def test_another_client_is_held_against_the_first_layout(tmp_path, monkeypatch):
    """A program in its place, that answers as perf_analyzer writes its table."""
    program = tmp_path / "perf_analyzer" / "perf_analyzer"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "get = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "rate = {'ours': 30, 'theirs': 10}[get['-m']] * int(get['--concurrency-range'])\n"
        "head = 'Concurrency,Inferences/Second,p50 latency,p99 latency'\n"
        "open(get['-f'], 'w').write(f'{head}\\n1,{rate},2000,5000\\n')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("TDEPLOY_TRITON_HOME", str(tmp_path))
    triton, server = SimpleNamespace(http=1, grpc=2), SimpleNamespace(wheel=tmp_path)
    asked = (("http", "ours", "text"), ("grpc", "theirs", "TEXT"))
    found, loads = perf_analyzer.figures(triton, server, asked, ["a"], (1, 4), 1.0)
    assert [figure.value for figure in found] == [3.0, 30.0, 120.0, 10.0, 40.0]
    assert loads["ours, http"][4] == {"requests_per_s": 120.0, "p50_ms": 2.0, "p99_ms": 5.0}
