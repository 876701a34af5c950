from __future__ import annotations

from tests.triton.conftest import server  # noqa: F401
