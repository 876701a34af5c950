import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.hashing import record_file
from tests.bundles import WEIGHTS, accuracy, linear_graph, make_bundle


def run(*arguments, ok=True):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) is ok, result.output
    return result.output


@pytest.fixture
def bundle(tmp_path):
    evidence = {"onnx-fp32": [accuracy("onnx-fp32")], "ort-cpu-int8": [accuracy("ort-cpu-int8", passed=False)]}
    return make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS}, evidence=evidence)


def test_inspect_shows_signature_variants_and_evidence(bundle):
    output = run("inspect", bundle)
    assert "batch 1..8 (opt 2)" in output
    assert "x: float32[batch, 4]" in output
    assert "worst_cosine >= 0.99" in output
    assert "worst_cosine is 0.9 (budget worst_cosine >= 0.99)" in output
    assert re.search(r"onnx-fp32 .*worst_cosine [\d.]+ +ok", output)


def test_inspect_writes_json_that_holds_every_record(bundle):
    document = json.loads(run("inspect", bundle, "--json"))
    assert set(document["variants"]) == {"onnx-fp32", "ort-cpu-int8"}
    assert document["evidence"]["ort-cpu-int8"][0]["passed"] is False


def test_inspect_says_what_to_do_when_there_is_no_bundle(tmp_path):
    output = run("inspect", tmp_path, ok=False)
    assert output.startswith("Error: ")
    assert "Traceback" not in output


def test_explain_says_which_variant_serves_and_why_not_the_other(bundle):
    output = run("explain", bundle)
    lines = {line.split()[0]: line for line in output.splitlines()[1:]}
    assert "serves" in lines["onnx-fp32"]
    assert "over budget" in lines["ort-cpu-int8"]
    assert json.loads(run("explain", bundle, "--json"))["chosen"] == {"variant": "onnx-fp32", "runtime": "ort-cpu"}


def test_inspect_and_explain_show_a_variant_that_a_newer_version_added(bundle):
    record = bundle / "tdeploy/variants/trt-fp16-sm90.json"
    record.write_text('{"id": "trt-fp16-sm90", "schema_version": 2}')
    for command in ("inspect", "explain"):
        (line,) = [line for line in run(command, bundle).splitlines() if line.startswith("trt-fp16-sm90")]
        assert "written by a newer mlflow-tdeploy (schema 2)" in line
    assert "trt-fp16-sm90" in json.loads(run("inspect", bundle, "--json"))["unreadable"]
    assert "schema 2" in run("explain", bundle, "--variant", "trt-fp16-sm90", ok=False)


def test_inspect_and_explain_show_a_variant_that_could_not_be_made(bundle):
    manifest = bundle / "tdeploy/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "skipped": {"onnx-fp16": "no such operator"}}))
    for command in ("inspect", "explain"):
        (line,) = [line for line in run(command, bundle).splitlines() if line.startswith("onnx-fp16")]
        assert "could not be made: no such operator" in line


def test_explain_fails_when_the_forced_variant_cannot_serve(bundle):
    assert "over budget" in run("explain", bundle, "--variant", "ort-cpu-int8", ok=False)


@pytest.fixture
def forced(tmp_path):
    """A saved model whose own configuration forces its second-best variant."""
    variants = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}
    mlflow_tdeploy.save_model(
        make_bundle(tmp_path / "made", variants), tmp_path / "model", model_config={"variant": "onnx-fp32"}
    )
    return tmp_path / "model"


def test_explain_and_bench_obey_what_was_saved_with_the_model(forced, tmp_path):
    assert json.loads(run("explain", forced, "--json"))["chosen"]["variant"] == "onnx-fp32"
    lifted = json.loads(run("explain", forced, "--json", "--variant", ""))
    assert lifted["chosen"]["variant"] == "ort-cpu-fp32"
    run("bench", forced, "--shape", "batch=1", "--rounds", 3, "--json", tmp_path / "rows.json")
    assert {row["variant"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {"onnx-fp32"}


def test_inspecting_a_folder_makes_no_mlflow_database(bundle, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    run("inspect", bundle)
    os.rename(bundle, tmp_path / f"m-{'0' * 32}")  # a folder of MLflow's, without its database
    run("inspect", tmp_path / f"m-{'0' * 32}")
    assert list((tmp_path / "cwd").iterdir()) == []


def test_bench_times_variants_at_the_shapes_asked_for(bundle, tmp_path):
    path = tmp_path / "rows.json"
    output = run("bench", bundle, "--shape", "batch=1", "--shape", "batch=8", "--rounds", 3, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["variant"], row["shape"], row["count"]) for row in rows] == [
        ("onnx-fp32", {"batch": 1}, 3),
        ("onnx-fp32", {"batch": 8}, 3),
    ]
    assert rows[1]["throughput_per_s"] == pytest.approx(8e3 / rows[1]["mean_ms"])
    assert "p99" in output
    assert "(serving also tries every core for it" in output
    fixed = run("bench", bundle, "--shape", "batch=8", "--rounds", 3, "--intra-op-threads", 2)
    assert "as served with intra_op_threads=2" in fixed


def test_bench_record_adds_evidence_by_which_this_host_ranks(forced, tmp_path):
    variants = {"onnx-fp32", "ort-cpu-fp32"}
    run("bench", forced, "--record", "--rounds", 3, "--json", tmp_path / "rows.json")  # all, whatever is forced
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    after = Bundle.open(forced)
    for name in variants:
        (latency,) = [record for record in after.evidence(name) if record.kind == "latency"]
        short, opt = [row for row in rows if row["variant"] == name]
        assert latency.shapes == ("short_p50_ms: batch=1", "p50_ms: batch=2")
        assert (latency.metrics["short_p50_ms"], latency.metrics["p50_ms"]) == (short["p50_ms"], opt["p50_ms"])
        assert latency.settings["runtime"] == "ort-cpu"
        assert (latency.settings["intra_op_threads"], latency.settings["token_budget"]) == (1, 256)
        assert latency.settings["interleaved_with"] == sorted(variants)
        assert latency.files == after.variants[name].digest
    candidates = json.loads(run("explain", forced, "--variant", "", "--json"))["candidates"]
    ranked = [c["latency_ms"] for c in candidates if c["fit"] in ("optimal", "usable")]
    assert len(ranked) == 2
    assert ranked == sorted(ranked)


@pytest.mark.parametrize("how", [("--variant", ""), ("--record",)])
def test_bench_leaves_out_a_variant_whose_file_was_changed_and_times_the_others(forced, tmp_path, how):
    weights = forced / "tdeploy" / "files" / "ort-cpu-fp32" / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    run("bench", forced, *how, "--rounds", 3, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"onnx-fp32"}


def test_bench_record_refuses_choices_that_would_make_figures_differ(bundle):
    for option in (("--variant", "onnx-fp32"), ("--shape", "batch=1"), ("--intra-op-threads", 4)):
        assert "leave the other choices out" in run("bench", bundle, "--record", *option, ok=False)


def test_cache_shows_and_prunes(monkeypatch, tmp_path):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    ContentCache().add(tmp_path / "file", record_file(tmp_path, "file"))
    assert "total      3.0 MB" in run("cache")
    assert "freed      0.0 MB" in run("cache", "--prune", "3MB")
    assert "freed      3.0 MB" in run("cache", "--prune", "2.9 mb")
    assert "Cannot read the size 'much'" in run("cache", "--prune", "much", ok=False)


@pytest.mark.parametrize(
    ("shape", "message"),
    [("batch=9", "outside its range 1..8"), ("batch:1", "Cannot read the shape"), ("rows=1", "No dimension 'rows'")],
)
def test_bench_names_the_dimension_when_a_shape_is_wrong(bundle, shape, message):
    assert message in run("bench", bundle, "--shape", shape, ok=False)


def test_doctor_exercises_every_runtime_and_names_what_is_missing():
    report = json.loads(run("doctor", "--json"))
    runtimes = {entry["name"]: entry for entry in report["runtimes"]}
    assert runtimes["ort-cpu"]["works"] == "yes"
    assert "CPUExecutionProvider" in runtimes["ort-cpu"]["detail"]
    assert report["host"]["cores"] >= 1
    assert "runtime" in run("doctor")
    assert report["conflicts"] == []


def test_doctor_tells_when_two_builds_of_onnx_runtime_overwrite_each_other(tmp_path, monkeypatch):
    folder = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in run("doctor")


def test_doctor_sees_no_conflict_in_packages_that_belong_together(tmp_path, monkeypatch):
    """``tensorrt`` is a name for ``tensorrt-cu13``, which it installs."""
    for name in ("tensorrt", "tensorrt_cu13"):
        folder = tmp_path / f"{name}-10.16.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 10.16\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert json.loads(run("doctor", "--json"))["conflicts"] == []


def test_log_writes_a_folder_that_inspect_and_explain_read(tmp_path):
    linear_graph(tmp_path / "graph.onnx", np.asarray(WEIGHTS))
    output = run(
        "log", tmp_path / "graph.onnx", "--task", "tensors", "--shape", "batch=1,2,8", "--out", tmp_path / "out",
        "--precision", "fp32",
    )  # fmt: skip
    assert " s " in output
    assert "batch 1..8 (opt 2)" in run("inspect", tmp_path / "out")
    assert "serves" in run("explain", tmp_path / "out")


def test_log_refuses_contradicting_options(tmp_path):
    assert "--alias needs --register" in run("log", "x", "--alias", "champion", ok=False)
    assert "need MLflow" in run("log", "x", "--out", tmp_path / "o", "--register", "m", ok=False)
    assert "not of the form batch=1,8,64" in run("log", "x", "--shape", "batch=a", ok=False)


def test_inspect_shows_a_model_of_a_task_that_only_a_newer_version_knows(bundle):
    manifest = bundle / "tdeploy/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "task": "token-classification"}))
    output = run("inspect", bundle)
    assert "token-classification" in output
    assert "onnx-fp32" in output


def test_log_names_the_file_and_the_byte_when_texts_are_not_utf8(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"abc\xff\xfe\n")
    output = run("log", tmp_path, "--out", tmp_path / "o", "--texts", tmp_path / "texts.txt", ok=False)
    assert "texts.txt' is not UTF-8: byte 3 is 0xff" in output
    assert "Traceback" not in output
    assert not (tmp_path / "o").exists()


def test_bench_refuses_no_rounds(bundle):
    assert "0 is not in the range x>=1" in run("bench", bundle, "--rounds", 0, ok=False)


def test_inspect_says_so_when_a_store_cannot_be_reached(monkeypatch, bundle):
    def gone(uri):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("mlflow_tdeploy.registry_io.locate", gone)
    assert (
        run("inspect", "ftp://127.0.0.1/x", ok=False)
        == "Error: ConnectionRefusedError: [Errno 111] Connection refused\n"
    )


def test_inspect_says_when_evidence_is_not_against_the_original(tmp_path):
    other = dataclasses.replace(accuracy("onnx-fp16"), settings={"reference": "onnx-fp32"})
    root = make_bundle(tmp_path / "m", {"hf": WEIGHTS, "onnx-fp16": WEIGHTS}, evidence={"onnx-fp16": [other]})
    assert "ok (against onnx-fp32)" in run("inspect", root)


def test_doctor_says_how_to_mend_libraries_that_are_installed_and_broken(tmp_path, monkeypatch):
    for name in ("tokenizers", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libfoo.so: cannot open shared object')")
    monkeypatch.syspath_prepend(str(tmp_path))
    output = run("doctor")
    (row,) = [line for line in output.splitlines() if line.startswith("ort-cpu")]
    assert "libfoo.so: cannot open shared object (reinstall: pip install 'mlflow-tdeploy[cpu]')" in row
    assert "pip install --force-reinstall tokenizers" in output


def test_inspect_says_that_a_file_is_no_folder(tmp_path):
    (tmp_path / "mlflow.db").write_text("")
    assert "that is a file, not a model's folder" in run("inspect", tmp_path / "mlflow.db", ok=False)


def test_an_address_where_no_model_is_is_told_without_a_traceback():
    for uri in ("http://127.0.0.1:9/y", "mlflow-artifacts://127.0.0.1:9/y"):
        result = CliRunner().invoke(main, ["inspect", uri])
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert isinstance(result.exception, SystemExit)


def test_quantize_adds_a_variant_within_the_budget_and_says_what_it_does_not_keep(tmp_path):
    from tests.build.building import FP32, build
    from tests.build.test_int8_mixed import Planted, source

    build(source(Planted()), tmp_path / "model", FP32)
    done = CliRunner().invoke(main, ["quantize", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "0 by blocks and 1 in fp32 of 6 products" in done.output
    assert "Added ort-cpu-int8-mixed to" in done.output
    plain = CliRunner().invoke(main, ["quantize", str(tmp_path / "model"), "ort-cpu-int8"])
    assert plain.exit_code == 1
    assert "'ort-cpu-int8' is over the budget: not kept" in plain.output
    unknown = CliRunner().invoke(main, ["quantize", str(tmp_path / "model"), "int5"])
    assert unknown.exit_code == 1
    assert "Unknown precision or variant 'int5'" in unknown.output
    bounded = CliRunner().invoke(main, ["quantize", str(tmp_path / "model"), "ort-cpu-int8", "--minutes", "1"])
    assert bounded.exit_code == 2
    assert "'ort-cpu-int8' looks for nothing: leave out --minutes and --trials." in bounded.output

    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "model"), "--products"]).output
    rows = [line.split() for line in shown.splitlines() if line.startswith("node_")]
    off = {name: float(last) for name, *_, last in rows if last != "-"}
    spared = next(name for name, _, why, *_ in rows if why == "spared")
    assert max(off, key=off.get) == spared


def test_quantize_takes_a_calibrator_what_to_keep_and_how_much_to_calibrate_with(tmp_path):
    from tests.build.building import FP32, build
    from tests.build.test_int8_mixed import Planted, source

    build(source(Planted(())), tmp_path / "model", FP32)
    command = ["quantize", str(tmp_path / "model"), "onnx-int8", "--calibrator", "max", "--calibrate-most", "1"]
    nobody = CliRunner().invoke(main, [*command, "--keep", "nobody"])
    assert nobody.exit_code == 1
    assert "Nothing that 'onnx-int8' could quantize is called 'nobody'" in nobody.output
    done = CliRunner().invoke(main, [*command, "--keep", ".*linear_2_.*", "--keep", ".*linear_4_.*"])
    assert done.exit_code == 0, done.output
    made = Bundle.open(tmp_path / "model").variants["onnx-int8"].precision
    assert len(made.kept) >= 2
    assert made.settings["said"] == {"calibrator": "max", "keep": [".*linear_2_.*", ".*linear_4_.*"]}
    assert made.settings["calibration"]["items"] == 1
    other = CliRunner().invoke(main, ["quantize", str(tmp_path / "model"), "ort-cpu-int8-mixed", "--calibrator", "max"])
    assert other.exit_code == 1
    assert "it has no calibrators to choose from" in other.output


def test_images_go_through_the_commands(tmp_path, caplog):
    """Logged with folders as classes, looked at, measured, verified on a folder without."""
    from tests.core.tasks.image_models import LABELS, written
    from tests.pictures import pictures

    source, out = written("vit", tmp_path / "source"), tmp_path / "out"
    for index, file in enumerate(pictures(24)):
        folder = tmp_path / "data" / LABELS[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(file)
    data = str(tmp_path / "data")
    logged = run("log", source, "--out", out, "--precision", "fp32", "--data", data, "--image-processor", source)
    assert "reference answers" in logged
    assert "image-classification" in run("inspect", out)
    assert "accuracy" in run("inspect", out, "--json")
    analyzed = run("analyze", out, "--data", data, "--variant", "ort-cpu-fp32", "--batch", "1")
    assert "24 items" in analyzed
    assert " MiB" in analyzed
    assert "not known" not in caplog.text
    assert "64 items (given and 40 made-up pictures)" in run("verify", out, "--texts", data)
    assert "ort-cpu-fp32: within budget" in run("verify", out, "--data", data)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no images in it" in run("verify", out, "--texts", empty, ok=False)


def test_one_command_logs_measures_and_tells_what_variants_cost(tmp_path):
    linear_graph(tmp_path / "graph.onnx", np.asarray(WEIGHTS))
    told = run(
        "log", tmp_path / "graph.onnx", "--task", "tensors", "--shapes", "batch=1,2,8", "--out", tmp_path / "out",
        "--precisions", "fp32, onnx-fp16", "--bench", "--price-per-hour", "2", "--currency", "EUR",
    )  # fmt: skip
    assert "make onnx-fp16" in told
    assert "as served" in told
    assert "EUR per million" in told
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in told
    again = json.loads(run("report", tmp_path / "out", "--json"))
    assert {card["measured"] for card in again["cards"]} == {"as served"}
    assert again["price"] is None
    for wrong, why in (
        (["log", "x", "--price-per-hour", "2"], "add --bench"),
        (["report", tmp_path / "out", "--data", tmp_path / "graph.onnx"], "add --measure"),
        (["report", tmp_path / "none"], "No model at"),
    ):
        assert why in run(*wrong, ok=False)
    refused = run("log", tmp_path / "graph.onnx", "--engines", "fp32,fp5", "--out", tmp_path / "o", ok=False)
    assert "fp5" in refused


def test_the_table_beside_convert_model_names_options_that_there_are():
    page = (Path(__file__).parents[1] / "docs" / "convert_model.md").read_text()
    ours = [row.split("|")[2] for row in page.splitlines() if row.startswith("| `")]
    assert len(ours) == 21
    known = {name for command in main.commands.values() for option in command.params for name in option.opts}
    named = {name for cell in ours for name in re.findall(r"(?<![\w-])(--?[a-zA-Z][a-z-]*)", cell)}
    assert {"--shape", "--precisions", "--bench", "-C"} <= named
    assert named <= known
    commands = {name for cell in ours for name in re.findall(r"tdeploy ([a-z]+)", cell)}
    assert commands <= set(main.commands)
