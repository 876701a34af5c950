"""onnxscript's rewriting, held to what leaves every answer as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnxscript

from mlflow_tdeploy.core.errors import BuildError


@contextlib.contextmanager
def exact_rules() -> Iterator[None]:
    """Have ``x + 0`` and ``x * 1`` removed for 0 and 1 only, and not for what is nearly that.

    onnxscript compares constants within 1e-8, torch's exporter calls it, and ``log(p + 1e-9)`` becomes ``log(p)``: the
    ε that keeps silence, a black image or a class without any probability finite is gone.

    Raises:
        BuildError: This release of onnxscript has its rules elsewhere.
    """
    constants = _constants_of_no_ops()
    before = [(one, one._rel_tol, one._abs_tol) for one in constants]
    for one in constants:
        one._rel_tol = one._abs_tol = 0.0
    try:
        yield
    finally:
        for one, relative, absolute in before:
            one._rel_tol, one._abs_tol = relative, absolute


def _constants_of_no_ops() -> list[Any]:
    try:
        from onnxscript.rewriter._pattern_ir import Constant
        from onnxscript.rewriter.rules.common import _no_op

        nodes = [node for rule in _no_op.rules for node in rule._target_pattern]
        return [value for node in nodes for value in node.inputs if isinstance(value, Constant)]
    except (ImportError, AttributeError) as error:
        raise BuildError(
            f"The rewriting rules of onnxscript {onnxscript.__version__} are not where this package looks for them "
            f"({error}), and as they are they remove small constants. Install a release it knows: "
            f"pip install 'onnxscript>=0.5.6,<0.8'"
        ) from error
