"""The report page of a model: what it says, that it is whole by itself, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.flavor.report.cost import Price, cost_cards
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import make_bundle
from tests.core.tasks.image_models import written
from tests.pictures import pictures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model of images in a folder, and the report that was made of it with measurements."""
    folder = tmp_path_factory.mktemp("report")
    mlflow_tdeploy.save_model(
        written("vit", folder / "source"), folder / "model", precisions=["fp32", "int8"],
        verify_with={"image": pictures(64), "label": ["sky"] * 64}, shapes={"batch": (1, 4, 8)},
    )  # fmt: skip
    logged = (folder / "model" / "report.html").read_text()
    report = mlflow_tdeploy.report_model(
        str(folder / "model"), measure=True, batches=(1, 8), price_per_hour=3.6, currency="EUR"
    )
    return folder / "model", logged, report


class _Whole(HTMLParser):
    """Notes what a page would take from elsewhere, what runs in it, and which elements are left open."""

    def __init__(self):
        super().__init__()
        self.taken, self.open = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not (value or "").startswith(
                ("data:image/", "#")
            ):
                self.taken.append((tag, value))
            if name.startswith("on"):
                self.taken.append((tag, name))
        if tag in ("script", "iframe", "link", "object", "embed"):
            self.taken.append((tag, ""))
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _text(page):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)))


def test_a_logged_model_has_its_report_beside_the_bundle(measured):
    folder, page, _ = measured
    text = _text(page)
    bundle = Bundle.open(folder)
    for name, variant in bundle.variants.items():
        assert name in text
        assert variant.dropped or f"{variant.size / 1e6:.1f} MB" in text
    assert "over budget: max_score_difference is" in text
    assert "batch 1 4 8" in text
    assert "input pixel_values float32 batch × 3 × 64 × 64" in text
    assert "The host that made this page serves ort-cpu-fp32 on ort-cpu." in text
    assert "64 items: given" in text
    assert "7: temple, flower" in text
    assert "brought to 64 x 64, mean [0.5, 0.5, 0.5]" in text
    assert page.count('alt="a golden picture"') == 3
    assert f"torch {bundle.manifest.made_with['torch']}" in text
    assert (folder / "report" / "closeness.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report" / "speed.png").is_file()


def test_a_page_takes_nothing_from_anywhere_and_runs_nothing(measured):
    for page in (measured[1], (measured[0] / "report.html").read_text()):
        parser = _Whole()
        parser.feed(page)
        assert parser.taken == []
        assert parser.open == []
        assert "url(" not in page.replace("url(#", "")
        assert "@import" not in page


def test_measuring_adds_what_variants_cost(measured):
    folder, before, report = measured
    assert "tdeploy report URI --price-per-hour" in _text(before)
    assert "graph" in _text(before)  # what a build has measured
    page = _text((folder / "report.html").read_text())
    assert "At 3.6 EUR for an hour" in page
    assert "Time over sizes" in page
    assert (folder / "report" / "sizes.png").is_file()
    cards = {card.variant: card for card in report.cards}
    assert set(cards) == {"hf", "onnx-fp32", "ort-cpu-fp32"}
    card = cards["ort-cpu-fp32"]
    assert card.measured == "as served"
    assert (card.large, card.runtime, card.precision) == (8, "ort-cpu", "fp32")
    assert card.memory_mib > 20
    assert card.small_ms > 0
    assert card.per_second > 1
    # 3.6 an hour is a thousandth a second
    assert card.small_per_million == pytest.approx(1e6 * card.small_ms / 1e3 * 1e-3)
    assert card.large_per_million == pytest.approx(1e6 / card.per_second * 1e-3)
    for figure in (f"{card.small_ms:.2f}", f"{card.small_per_million:.3g}", f"{card.memory_mib:.0f}"):
        assert figure in page
        assert figure in report.table()
    kinds = {record.kind for record in Bundle.open(folder).evidence("ort-cpu-fp32")}
    assert {"accuracy", "latency", "served", "sweep"} <= kinds


def test_newer_evidence_is_what_the_page_says(measured, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(measured[0], folder)
    mlflow_tdeploy.verify_model(str(folder), ["onnx-fp32"], verify_with=pictures(70))
    assert "70 items" not in _text((folder / "report.html").read_text())
    found = mlflow_tdeploy.report_model(str(folder), out=tmp_path / "other")
    assert "70 items" in _text((tmp_path / "other" / "report.html").read_text())
    assert found.place == str(tmp_path / "other" / "report.html")
    assert found.price is None
    assert "70 items" not in _text((folder / "report.html").read_text())


@pytest.mark.parametrize("store", ["tracking", "remote"])
def test_a_report_is_among_the_artifacts_of_a_logged_model_and_made_again_there(store, request, tmp_path):
    request.getfixturevalue(store)
    info = mlflow_tdeploy.log_model(
        str(make_bundle(tmp_path / "made")), name="linear", registered_model_name=f"linear-{store}"
    )
    listed = {one.path for one in MlflowClient().list_logged_model_artifacts(info.model_id)}
    assert "report.html" in listed
    result = CliRunner().invoke(main, ["report", f"models:/linear-{store}/1", "--price-per-hour", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"].endswith("report.html")
    where = mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(tmp_path / "down"))
    assert f"models:/linear-{store}/1" in (Path(where) / "report.html").read_text()


def test_texts_and_arrays_of_golden_requests_are_shown_short_and_as_text(tmp_path):
    mlflow_tdeploy.save_model(str(make_bundle(tmp_path / "made")), tmp_path / "model")
    page = _text((tmp_path / "model" / "report.html").read_text())
    assert "x: " in page
    assert "float32 1 × 4" in page
    from mlflow_tdeploy.core.golden import GoldenRequest
    from mlflow_tdeploy.flavor.report.facts import _golden

    shown = _golden(GoldenRequest(["<b>" + "a" * 900, ["q", "c"]], {}, {}, [np.arange(9.0), {"score": 0.123456789}]))
    assert shown.asked[0] == "<b>" + "a" * 317 + "…"
    assert shown.asked[1] == '["q", "c"]'
    assert shown.answered == ("float64 9: 0, 1, 2, 3, …", '{"score": 0.123457}')


def test_names_from_outside_are_text_in_the_page(measured, tmp_path):
    from mlflow_tdeploy.flavor.report.page import page
    from mlflow_tdeploy.runtime import probe
    from mlflow_tdeploy.runtime.select import decide_bundle

    bundle = Bundle.open(measured[0])
    made = page(
        bundle, decide_bundle(bundle, probe.host()), title="<script>alert(1)</script>", uri='"><img src=x>'
    ).html
    parser = _Whole()
    parser.feed(made)
    assert parser.taken == []
    assert "<script>alert(1)</script>" in html.unescape(made)


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "cheap", True])
def test_a_price_that_is_none_is_refused(wrong):
    with pytest.raises(InvalidInputError, match="price of an hour must be"):
        Price(wrong)


def test_cards_of_several_hosts_are_beside_each_other_and_the_newest_counts(measured, tmp_path):
    from dataclasses import replace

    from mlflow_tdeploy.store.writer import append_evidence

    folder = tmp_path / "model"
    shutil.copytree(measured[0], folder)
    bundle = Bundle.open(folder)
    served = next(one for one in bundle.evidence("onnx-fp32") if one.kind == "served")
    other = replace(served, host=replace(served.host, cpu="Another"), created="2999-01-01")
    newer = replace(served, metrics={**served.metrics, "p50_ms_of_1": 0.5}, created="2999-01-01")
    for one in (other, newer):
        append_evidence(bundle.root, one)
    cards = [card for card in cost_cards(Bundle.open(folder)) if card.variant == "onnx-fp32"]
    assert len({card.host for card in cards}) == len(cards) == 2
    assert sorted(card.small_ms for card in cards) == sorted([0.5, served.metrics["p50_ms_of_1"]])
    assert all(card.small_per_million is None for card in cards)


def test_a_model_is_logged_without_its_report_where_that_fails(tmp_path, monkeypatch, caplog):
    from mlflow_tdeploy.flavor.report import page

    monkeypatch.setattr(page, "plots", lambda bundle: 1 / 0)
    mlflow_tdeploy.save_model(str(make_bundle(tmp_path / "made")), tmp_path / "model")
    assert not (tmp_path / "model" / "report.html").exists()
    assert "logged without its report" in caplog.text
    assert mlflow_tdeploy.load_model(str(tmp_path / "model")) is not None


def test_without_matplotlib_there_are_no_pictures_and_the_page_says_so(measured, tmp_path, monkeypatch):
    from mlflow_tdeploy.flavor.report import plots

    monkeypatch.setattr(plots, "can_draw", lambda: False)
    mlflow_tdeploy.report_model(str(measured[0]), out=tmp_path)
    assert "matplotlib is not installed" in _text((tmp_path / "report.html").read_text())
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_it_without_anything_beyond_its_width(measured, tmp_path, width):
    """The page in a frame as wide as a desktop and as a phone: nothing sticks out, pictures and tables are there."""
    page = (measured[0] / "report.html").read_text()
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe id="f" width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        "<pre id='told'></pre><script>f.onload = () => { const d = f.contentDocument, e = d.documentElement;"
        "const out = [...d.body.querySelectorAll('*')].filter(one => !one.closest('.wide, svg, .plot') &&"
        "one.getBoundingClientRect().right > e.clientWidth + 1).map(one => one.tagName);"
        "told.textContent = JSON.stringify({wide: e.scrollWidth, has: e.clientWidth, out: out,"
        "drawn: [...d.querySelectorAll('svg')].map(one => one.getBoundingClientRect().height > 50),"
        "pictures: [...d.images].map(one => one.naturalWidth > 0), title: d.title}); };</script>"
    )
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done)[1]))
    assert found["has"] == pytest.approx(width, abs=20)  # less a scroll bar
    assert found["wide"] <= found["has"]
    assert found["out"] == []
    assert found["drawn"] == [True] * 3
    assert found["pictures"] == [True] * 3
    assert found["title"] == "source"


def _with(folder, tmp_path, *records):
    """A copy of a model that has more evidence."""
    from mlflow_tdeploy.store.writer import append_evidence

    shutil.copytree(folder, tmp_path / "model")
    for one in records:
        append_evidence(Bundle.open(tmp_path / "model").root, one)
    return Bundle.open(tmp_path / "model")


def _kind(bundle, variant, kind):
    return next(one for one in bundle.evidence(variant) if one.kind == kind)


def test_pictures_and_prices_are_of_one_kind_of_host(measured, tmp_path):
    from dataclasses import replace

    from mlflow_tdeploy.flavor.report.plots import plots

    bundle = Bundle.open(measured[0])
    elsewhere = replace(_kind(bundle, "onnx-fp32", "sweep").host, cpu="Another")
    records = [
        replace(_kind(bundle, "ort-cpu-fp32", kind), host=elsewhere, created="2999-01-01")
        for kind in ("sweep", "served", "latency")
    ]
    bundle = _with(measured[0], tmp_path, *records)
    drawn = {one.name: one for one in plots(bundle)}
    assert "Another" in drawn["sizes"].title
    assert "Another" in drawn["speed"].title
    assert "onnx-fp32" not in drawn["sizes"].told
    assert "onnx-fp32" not in drawn["speed"].told
    report = mlflow_tdeploy.report_model(str(tmp_path / "model"), out=tmp_path / "out", price_per_hour=1)
    assert {card.host == elsewhere.kind: card.small_per_million is None for card in report.cards} == {
        True: True, False: False,
    }  # fmt: skip


def test_cards_say_of_how_many_items_they_are(measured, tmp_path):
    from dataclasses import replace

    bundle = Bundle.open(measured[0])
    served = _kind(bundle, "hf", "served")
    metrics = {"p50_ms_of_4": 8.0, "items_per_s_of_16": 500.0}
    broken = replace(served, metrics={"p50_ms_of_1": 1.0}, created="2999-01-02")
    of_four = replace(served, metrics=metrics, settings={"runtime": "torch", "batches": [4, 16]}, created="2999-01-01")
    cards = cost_cards(_with(measured[0], tmp_path, of_four, broken), Price(3.6))
    card = next(one for one in cards if one.variant == "hf")
    assert (card.small, card.small_ms, card.large, card.per_second) == (4, 8.0, 16, 500.0)
    assert card.small_per_million == pytest.approx(1e6 * 8e-3 / 4 * 1e-3)


def test_a_report_of_a_task_of_a_newer_version_is_made(measured, tmp_path):
    bundle = _with(measured[0], tmp_path)
    path = bundle.root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": "smelling"}))
    mlflow_tdeploy.report_model(str(tmp_path / "model"), out=tmp_path / "out")
    assert "smelling" in (tmp_path / "out" / "report.html").read_text()


def test_a_report_goes_beside_the_bundle_whichever_folder_is_named_and_old_pictures_go(measured, tmp_path):
    _with(measured[0], tmp_path)
    (tmp_path / "model" / "report" / "old.png").write_bytes(b"x")
    before = (tmp_path / "model" / "report.html").read_text()
    mlflow_tdeploy.report_model(str(tmp_path / "model" / "tdeploy"))
    assert (tmp_path / "model" / "report.html").read_text() != before
    assert not (tmp_path / "model" / "tdeploy" / "report.html").exists()
    assert not (tmp_path / "model" / "report" / "old.png").exists()


def test_measurements_that_a_store_does_not_take_are_told(measured, tmp_path, monkeypatch, caplog):
    from mlflow_tdeploy.flavor import measure

    def refuse(location, found):
        raise InvalidInputError("read-only")

    monkeypatch.setattr(measure, "append_evidence", refuse)
    mlflow_tdeploy.report_model(str(measured[0]), measure=True, batches=[1], out=tmp_path)
    assert "takes no measurements: read-only" in caplog.text
    assert "items/s" in caplog.text
    assert (tmp_path / "report.html").is_file()
