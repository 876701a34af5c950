"""What a variant that is added to a bundle starts from and is compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from mlflow_tdeploy.build.plan import HF
from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import lone, opened
from mlflow_tdeploy.build.steadiness import Shaken
from mlflow_tdeploy.core.compare import same_outputs
from mlflow_tdeploy.core.errors import (
    BuildError,
    IntegrityError,
    TDeployError,
)
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.masks import without_answer
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.spread import ABSOLUTE
from mlflow_tdeploy.core.tensors import Array
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import Session
from mlflow_tdeploy.source._shaken_graph import ShakenGraph
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.external_data import copy_graph

_log = logging.getLogger("mlflow_tdeploy")
#: Share of the largest number that another processor, library or order of sums may change in full precision.
_SAME = 5e-3
#: Of columns that are smaller than this share of the largest: what rounding leaves there is noise.
_NOISE = 1e-3
#: Share of whole numbers that may be chosen otherwise.
_OTHER_CHOICES = 0.5


class Here:
    """Variants of the bundle whose files are, or can be brought, here."""

    def __init__(self, bundle: Bundle, fetch: Fetch | None) -> None:
        self._bundle = bundle
        self._fetch = fetch

    def available(self, variant_id: str) -> bool:
        """Tell whether the variant has files to be had."""
        variant = self._bundle.variants.get(variant_id)
        if variant is None or variant.dropped:
            return False
        return self._fetch is not None or self._bundle.present(variant)

    def get(self, variant_id: str) -> Variant:
        """Return the variant, its files here and checked."""
        variant = self._bundle.variants[variant_id]
        if self._fetch is not None and not self._bundle.present(variant):
            self._fetch(variant)
        self._bundle.verify(variant)
        return variant

    def original(self) -> Source:
        """Return the original that the bundle keeps."""
        from mlflow_tdeploy.source.kept import KeptSource

        variant, manifest = self.get(HF), self._bundle.manifest
        folder = self._bundle.path(variant.entry)
        return KeptSource(folder, manifest.source, manifest.signature, manifest.task, manifest.task_config)

    def graph(self, variant_id: str, folder: Path) -> Graph:
        """Return the variant as the parent of others, linked into ``folder``: tools write beside their source."""
        variant = self.get(variant_id)
        folder.mkdir(parents=True)
        names = copy_graph(self._bundle.path(variant.entry), folder)
        return Graph(folder / names[0], variant.precision, variant.session, variant.dtypes)


def _vouched_for(bundle: Bundle, variant: Variant) -> bool:
    """Tell whether a variant may stand in for the reference: full precision, and a verdict that says it is right."""
    verdict = latest_accuracy(bundle.evidence(variant.id))
    sure = verdict is not None and verdict.passed is True and bundle.doubt(variant.id) is None
    return variant.precision.name == "fp32" and sure


def other_answer(requests: Iterable[GoldenRequest], session: Session) -> str | None:
    """Return how a session that shall be the original answers golden requests otherwise, or None.

    The same weights in full precision differ by rounding only, so no budget is asked: one that is wide enough for a
    quantized graph is wide enough for another model.

    Args:
        requests: Requests with the original's answers.
        session: Who is asked.

    Raises:
        SessionError: It cannot answer.
    """
    for request in requests:
        got = session.infer(request.feeds)
        if problem := same_outputs(request.outputs, got):
            return problem
        for name, wanted in request.outputs.items():
            if problem := _other_numbers(wanted, got[name]):
                return f"'{name}' {problem}"
    return None


def _other_numbers(wanted: Array, got: Array) -> str | None:
    """Return how one output is another one than wanted; each column of its last axis is held against its own size."""
    if not wanted.size:
        return None
    if wanted.dtype.kind in "biu":  # what is chosen may turn where two were as good
        share = float((wanted != got).mean())
        return f"has {100 * share:.2g} % other whole numbers" if share > _OTHER_CHOICES else None
    before, after = (one.astype(np.float64).reshape(-1, one.shape[-1] if one.ndim > 1 else 1) for one in (wanted, got))
    silent = without_answer(before, wanted.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = np.abs(np.where(silent, 0.0, before)).max(axis=0, initial=0.0)
        off = np.abs(np.where(silent, 0.0, after - before)).max(axis=0, initial=0.0)
    largest = sizes.max(initial=0.0)
    if (
        wrong := ~(off <= _SAME * np.maximum(sizes, _NOISE * largest) + ABSOLUTE * min(1.0, largest))
    ).any():  # NaN is wrong
        worst = int(np.argmax(wrong))
        return f"is off by {off[worst]:.3g}, of numbers up to {sizes[worst]:.3g}"
    return None


@contextmanager
def open_reference(bundle: Bundle, here: Here, *, stand_in: bool = True) -> Iterator[tuple[str, Infer, int]]:
    """Open the most faithful variant that can be opened; yields its id, its ``infer`` and its number of weights.

    Args:
        bundle: The bundle.
        here: What of it can be had.
        stand_in: Whether another one may stand in for the source and the model's own reference.

    Raises:
        IntegrityError: Files of the model's reference are damaged or gone: nothing else may quietly stand in for it.
        BuildError: None can be opened, or the model's reference is not the model that was logged.
    """
    first = (bundle.manifest.reference,)
    rest = sorted(name for name, one in bundle.variants.items() if stand_in and _vouched_for(bundle, one))
    reasons = []
    host = probe.host()
    with ExitStack() as stack:
        for variant_id in dict.fromkeys((*first, *rest)):
            if not here.available(variant_id):
                reasons.append(f"'{variant_id}' has no files here")
                if variant_id == bundle.manifest.reference and variant_id in bundle.variants:
                    bundle.verify(bundle.variants[variant_id])  # raises, naming the file
                continue
            try:
                variant = here.get(variant_id)
            except IntegrityError:
                raise
            except TDeployError as error:
                reasons.append(str(error))
                continue
            try:
                session, _ = stack.enter_context(
                    opened(bundle.root, variant, bundle.manifest.signature, host, lone(host))
                )
                why = other_answer(bundle.golden(), session)
            except TDeployError as error:
                reasons.append(str(error))
                continue
            if why and variant_id == bundle.manifest.reference:
                raise BuildError(
                    f"The model's reference '{variant_id}' answers a golden request otherwise here than where it was "
                    f"logged ({why}): nothing can be held against it. Install the versions of the model's "
                    f"requirements.txt, or log the model again."
                )
            if why:
                reasons.append(f"'{variant_id}' answers otherwise than the model that was logged: {why}")
                continue
            if variant_id != bundle.manifest.reference:
                why = reasons[0] if reasons else f"'{bundle.manifest.reference}' cannot be used"
                _log.warning("The new variant is compared with '%s', not with the original: %s", variant_id, why)
            yield variant_id, session.infer, variant.size // 4
            return
    raise BuildError(f"No variant of this model can be opened here as the reference: {'; '.join(reasons)}.")


def shaken_reference(bundle: Bundle, name: str) -> Shaken | None:
    """Return what asks a reference of a bundle with other roundings; None where it is no graph.

    Args:
        bundle: The bundle.
        name: Id of the variant that is the reference, as :func:`open_reference` has said.
    """
    variant = bundle.variants.get(name)
    if variant is None or variant.format not in ("onnx", "ort"):
        return None
    return ShakenGraph(bundle.path(variant.entry), [spec.name for spec in bundle.manifest.signature.outputs])
