"""Which variants are made, in which order, and which of them are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mlflow_tdeploy.build.recipes import RECIPES, Recipe
from mlflow_tdeploy.core.errors import InvalidInputError

#: The source itself: written whenever it can be, asked for or not.
HF = "hf"
#: The parent of every other graph.
PORTABLE = "onnx-fp32"
#: Whatever is fastest within the budget.
AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """The variants to make.

    Attributes:
        order: Recipes to run, parents first.
        keep: Ids that end up in the bundle; the rest are steps on the way.
        explicit: Ids that somebody asked for by name: a failure to make one is an error.
    """

    order: tuple[type[Recipe], ...]
    keep: frozenset[str]
    explicit: frozenset[str] = frozenset()


def plan_variants(
    precisions: Iterable[str] | None,
    *,
    given: Collection[str],
    exportable: bool,
    required: Collection[str] = (),
    parents: Collection[str] = (),
    gpu: bool = False,
) -> Plan:
    """Decide what to make.

    Args:
        precisions: Aliases (``auto``, ``fp32``, ``fp16``, ``int8``) or variant ids; None for everything that is made by
            default.
        given: Ids of graphs that exist already and are kept as they are.
        exportable: Whether recipes without a parent can run.
        required: Ids to keep in any case.
        parents: Ids of the graphs that engines will be built from; they are kept, too.
        gpu: Whether this host has a GPU: then what is made for one is made by default.

    Raises:
        InvalidInputError: A name that no recipe has, or one that cannot be made from this source.
    """
    required = {*required, *_parents(parents, given, exportable)}
    possible = {recipe.id: recipe for recipe in RECIPES if _possible(recipe, given, exportable)}
    asked: set[str] = set()
    if precisions is None:
        wanted = {one.id for one in possible.values() if one.default or (gpu and one.default_on_gpu)}
    else:
        named = {name: _named(name, possible, given, gpu) for name in _names(precisions)}
        wanted = set().union(*named.values())
        asked = {
            one
            for name, found in named.items()
            for one in found
            if one == name or not (name == AUTO or _faster(one, found))
        }
    wanted |= set(required)
    order: list[type[Recipe]] = []
    for variant_id in sorted(wanted):
        _add(variant_id, possible, given, order)
    explicit = frozenset((wanted & asked) | set(required))
    return Plan(tuple(order), frozenset(wanted | set(given)), explicit)


def _parents(parents: Collection[str], given: Collection[str], exportable: bool) -> set[str]:
    """Return which of them have to be made.

    Raises:
        InvalidInputError: One of them cannot be.
    """
    new = {parent for parent in parents if parent not in given}
    possible = {recipe.id for recipe in RECIPES if recipe.format == "onnx" and _possible(recipe, given, exportable)}
    if unknown := sorted(new - possible):
        names = ", ".join(sorted({*possible, *(one for one in given if one.startswith("onnx-"))})) or "none"
        raise InvalidInputError(
            f"Engines are built from portable graphs, and there will be no '{unknown[0]}'. Possible here: {names}."
        )
    return new


def _names(precisions: Iterable[str]) -> list[str]:
    if isinstance(precisions, str) or not all(isinstance(name, str) for name in precisions):
        raise InvalidInputError(f"precisions is a list like ['fp32', 'int8'], got {precisions!r}.")
    return list(precisions)


def _named(name: str, possible: dict[str, type[Recipe]], given: Collection[str], gpu: bool) -> set[str]:
    """Return the recipes behind a name; none for what exists anyway."""
    if name in (HF, *given):
        return set()
    found = recipes_of(name, gpu=gpu)
    if not found & set(possible):
        raise InvalidInputError(
            f"{name!r} cannot be made from this source: it needs the portable graph '{PORTABLE}', which neither exists "
            f"nor can be exported here. Give that graph, or log the model from its torch module."
        )
    return found & set(possible)


def _faster(recipe_id: str, same: Collection[str]) -> bool:
    """Tell whether a recipe makes a faster form of another one of the same precision: that one serves without it."""
    return RECIPES.get(recipe_id).parent in same


def recipes_of(name: str, *, gpu: bool = False) -> set[str]:
    """Return the ids of the recipes that a precision or an id means; those not made by default go by their id only.

    ``auto`` means what may be the fastest within the budget on this kind of host, and what serves where that is the
    original: recipes that search for it. Which of them is, is measured.

    Raises:
        InvalidInputError: None has that name.
    """
    if name == AUTO:
        return {one.id for one in RECIPES if _is_auto(one, gpu)}
    found = {one.id for one in RECIPES if name == one.id or (one.default and name == one.precision)}
    if not found:
        aliases = sorted({recipe.precision for recipe in RECIPES if recipe.default})
        raise InvalidInputError(
            f"Unknown precision or variant {name!r}. Precisions: {AUTO}, {', '.join(aliases)}; variants: "
            f"{', '.join(RECIPES.names())}."
        )
    return found


def _is_auto(recipe: type[Recipe], gpu: bool) -> bool:
    if recipe.device == "cuda":
        return gpu and recipe.default_on_gpu
    return recipe.id == "ort-cpu-fp32" or recipe.searches


def _possible(recipe: type[Recipe], given: Collection[str], exportable: bool) -> bool:
    if recipe.id in given:
        return False
    if recipe.parent is None:
        return exportable
    return recipe.parent in given or (
        recipe.parent in RECIPES and _possible(RECIPES.get(recipe.parent), given, exportable)
    )


def _add(variant_id: str, possible: dict[str, type[Recipe]], given: Collection[str], order: list[type[Recipe]]) -> None:
    if variant_id in given or any(recipe.id == variant_id for recipe in order):
        return
    recipe = possible[variant_id]
    if recipe.parent is not None:
        _add(recipe.parent, possible, given, order)
    order.append(recipe)
