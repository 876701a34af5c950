"""What a test asks of the one server that its file names."""

from __future__ import annotations

from mlflow_tdeploy.core.wire import rows_of
from mlflow_tdeploy.promotion.actual import deployments_at


def there(spec):
    target = spec.targets["both"]
    return deployments_at(target, target.servers[0])


def answers(spec):
    """Return the version that answers a request."""
    there(spec).client.infer("words", {"text": rows_of(["a cat"])})
    return there(spec).answering("words")
