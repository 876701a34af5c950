"""A real Triton for promotions."""

from tests.deploy.conftest import running, target  # noqa: F401
from tests.triton.conftest import server  # noqa: F401
