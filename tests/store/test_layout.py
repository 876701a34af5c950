from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, TDeployError
from mlflow_tdeploy.store.layout import safe_path


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "", "a\\b", "C:/x", "a\nb", "a\x00b", "a/", "\ud800"],
)
def test_safe_path_refuses_when_path_is_not_plain_relative(tmp_path, path):
    with pytest.raises(InvalidInputError, match="Unsafe path"):
        safe_path(tmp_path, path)


def test_safe_path_names_the_path_when_a_folder_on_the_way_is_a_link_outside(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "bundle" / "files").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="'files/model.onnx' leads out of the bundle"):
        safe_path(tmp_path / "bundle", "files/model.onnx")


def test_safe_path_refuses_when_a_link_goes_out_and_another_comes_back(tmp_path):
    root, outside = tmp_path / "bundle", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (outside / "back").symlink_to(root / "real")
    with pytest.raises(IntegrityError):
        safe_path(root, "out/back/file")


def test_safe_path_refuses_when_link_leads_to_a_sibling_with_the_same_prefix(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle-evil").mkdir()
    (tmp_path / "bundle" / "x").symlink_to(tmp_path / "bundle-evil")
    with pytest.raises(IntegrityError):
        safe_path(tmp_path / "bundle", "x")


def test_safe_path_allows_a_link_when_it_stays_inside(tmp_path):
    (tmp_path / "a").write_text("content")
    (tmp_path / "b").symlink_to("a")
    assert safe_path(tmp_path, "b").read_text() == "content"


def test_safe_path_works_when_the_root_itself_is_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert safe_path(tmp_path / "link", "a").read_text() == "content"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.one_of(st.text(), st.lists(st.sampled_from(["..", ".", "", "a", "~", "b" * 300]), max_size=6).map("/".join)))
def test_safe_path_stays_below_root_whatever_the_path(tmp_path, path):
    try:
        found = safe_path(tmp_path, path)
    except TDeployError:
        return
    assert Path(found).resolve().is_relative_to(tmp_path.resolve())
