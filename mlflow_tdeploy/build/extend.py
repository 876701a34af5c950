"""One more variant for a bundle that exists: made and checked in a folder apart, added by whoever asked for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import Here, open_reference, shaken_reference
from mlflow_tdeploy.build.plan import HF
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.reference import ReferenceAnswers
from mlflow_tdeploy.build.report import Step
from mlflow_tdeploy.build.stage import Staged, stage_graph
from mlflow_tdeploy.build.triton_repository import stage_repository
from mlflow_tdeploy.build.workshop import Progress, Workshop
from mlflow_tdeploy.core.errors import (
    BuildError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
)
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from mlflow_tdeploy.core.variant import Variant, check_variant_id
from mlflow_tdeploy.store.bundle import Bundle, Fetch

_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class Built:
    """A variant ready to be added.

    Attributes:
        variant: Its record; without files when it is over budget.
        staged: A folder laid out like the bundle with its files, or None when there are none.
        evidence: What was measured about it.
        steps: What was done.
    """

    variant: Variant
    staged: Path | None
    evidence: tuple[Evidence, ...]
    steps: tuple[Step, ...]


@one_at_a_time()
def build_variant(
    bundle: Bundle,
    what: str | Path,
    workdir: Path,
    options: BuildOptions | None = None,
    *,
    variant_id: str | None = None,
    fetch: Fetch | None = None,
    progress: Progress | None = None,
) -> Built:
    """Make a variant of a bundle and check it against the bundle's reference.

    The reference is the source itself where torch and its files are here, else the bundle's most faithful graph that
    can be opened; the evidence says which.

    Args:
        bundle: The bundle; it is only read.
        what: Name of a recipe, or the path of an ONNX graph or a Triton repository to take as it is.
        workdir: An empty folder for everything; what is returned lies in it.
        options: Options; a budget in them may only be stricter than the bundle's own, which holds in any case.
        variant_id: Id of the variant; needed for a graph, a recipe has its own.
        fetch: Brings a variant's files where the bundle was downloaded without them.
        progress: Told of every finished step.

    Raises:
        ConflictError: The bundle has a variant of that id.
        InvalidInputError: There is no such recipe, the graph's tensors are not the signature's, or the budget is
            wider than the bundle's.
        NotFoundError: There is no such graph.
        BuildError: The variant cannot be made here.
        BudgetError: It is over budget and ``on_budget`` is ``raise``.
    """
    options = options or BuildOptions()
    path = _given_path(what, variant_id)
    new_id = check_variant_id(variant_id or ("" if path else str(what)))
    if new_id == HF:
        raise InvalidInputError(f"The id '{HF}' is that of an original model of Hugging Face: choose another one.")
    refuse_taken(bundle, new_id, "Choose another id." if path else "Log the model again to have it made anew.")
    manifest = bundle.manifest
    budget = manifest.budget.tightened(options.budget) if options.budget else manifest.budget
    shop = Workshop(bundle.task(), budget, options, workdir, golden=bundle.golden(), progress=progress)
    if path is not None and path.is_dir():  # for Triton: nothing here can ask it
        taken = stage_repository(shop, new_id, path)
        return Built(taken.variant, taken.root, (), tuple(shop.steps))
    here = Here(bundle, fetch)
    with open_reference(bundle, here) as (name, infer, weights):
        answers = shop.ask_reference(infer, weights, shaken_reference(bundle, name))
    staged = _stage(shop, here, new_id, path, answers)
    if path is None and not shop.can_ask(RECIPES.get(new_id)):
        return Built(staged.variant, staged.root, (), tuple(shop.steps))
    verified = shop.check(staged, answers)
    evidence = shop.evidence(staged, verified, name)
    if not verified.passed:
        staged = staged.drop()
    else:
        evidence += shop.latencies({new_id: staged}, [])
    kept = None if staged.variant.dropped else staged.root
    return Built(staged.variant, kept, tuple(evidence), tuple(shop.steps))


def refuse_taken(bundle: Bundle, new_id: str, mend: str) -> None:
    """Make sure that a bundle has no variant of an id yet.

    Args:
        bundle: The bundle.
        new_id: The id.
        mend: What to do where it has one.

    Raises:
        ConflictError: It has one.
    """
    if new_id in bundle.unreadable:
        raise ConflictError(
            f"The model has a variant '{new_id}' that is {bundle.unreadable[new_id]}. Choose another id."
        )
    if (there := bundle.variants.get(new_id)) is not None:
        if there.dropped:
            mend = "It was refused and its files were not kept; log the model again with a wider budget=…."
        raise ConflictError(f"The model has a variant '{new_id}' already; variants are never replaced. {mend}")


def _given_path(what: str | Path, variant_id: str | None) -> Path | None:
    """Return the graph or the repository that was given, or None for the name of a recipe."""
    if isinstance(what, str) and what in RECIPES:
        return None
    path = Path(what)
    if path.is_dir() and variant_id is not None:
        return path
    if path.suffix != ".onnx":
        if isinstance(what, str) and variant_id is None:
            RECIPES.get(what)  # raises, listing what exists
        raise InvalidInputError(
            f"A ready-made variant is an ONNX graph in a file that ends in .onnx, or the folder of a Triton "
            f"repository, got '{path}'."
        )
    if not path.is_file():
        raise NotFoundError(f"There is no file '{path}' to take as the variant '{variant_id}'.")
    return path


def _stage(shop: Workshop, here: Here, new_id: str, path: Path | None, answers: ReferenceAnswers) -> Staged:
    root = shop.work / "staged"
    if path is not None:
        with shop.step(f"take {new_id}"):
            return stage_graph(new_id, path, root, shop.task.signature)
    recipe = RECIPES.get(new_id)
    chain = [recipe]
    while chain[0].parent is not None and not here.available(chain[0].parent):
        chain.insert(0, RECIPES.get(chain[0].parent))
    graph = None
    if chain[0].parent is not None:
        graph = here.graph(chain[0].parent, shop.work / "parent")
    elif here.available(HF):
        shop.source = here.original()
    else:
        raise BuildError(
            f"Variant '{new_id}' cannot be made here: it starts from the original, which this model does not hold, and "
            f"only logging the model has that."
        )
    for step in chain:
        staged = shop.make(step, graph, answers)
        graph = staged.graph
    return staged
