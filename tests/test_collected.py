"""Every test there is, is run: pytest leaves out folders of some names without a word."""

from __future__ import annotations

import fnmatch
from pathlib import Path


def test_no_folder_of_tests_is_left_out(pytestconfig):
    left_out = pytestconfig.getini("norecursedirs")
    folders = {parent for path in Path(__file__).parent.rglob("test_*.py") for parent in path.parents}
    assert any(folder.name == "build" for folder in folders)
    assert not [folder for folder in folders if any(fnmatch.fnmatch(folder.name, one) for one in left_out)]
