"""Every test of the runtime has a cache of its own and no forced choice."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("VARIANT", "RUNTIME", "STRICT"):
        monkeypatch.delenv(f"TDEPLOY_{name}", raising=False)
