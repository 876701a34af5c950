import json

from benchmarks import picture


def test_picture_shows_the_results_in_the_repository(tmp_path):
    results = json.loads(picture.RESULTS.read_text())
    found = picture.bars(results, "short")
    assert list(found)[-2:] == ["floor int8", "ours int8"]
    measured = results["latency"]["details"]["short"]["calls"]["floor"]["ours int8"]["median_ms"]
    assert found["ours int8"] == measured / 1e3
    assert picture.main(["--out", str(tmp_path / "deep" / "picture.svg")]) == 0
    drawn = (tmp_path / "deep" / "picture.svg").read_text()
    assert drawn.count("<svg") == 1


def test_starts_are_compared_within_one_environment():
    places = {
        "serving environment": {"seconds": {"ours fp32": [2.0]}},
        "development environment": {
            "seconds": {"ours fp32": [9.0, 1.0, 5.0], "mlflow.onnx": [4.0], "import mlflow.pyfunc": [1.0]}
        },
        "rounds": 5,
    }
    assert picture.started({"startup": {"details": places}}) == {"mlflow.onnx": 4.0, "ours fp32": 5.0}
