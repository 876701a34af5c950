"""Recipes: how one variant is made from another. One file each; adding a recipe is adding a file here."""

from __future__ import annotations

from mlflow_tdeploy.build.recipes._base import Graph, Measure, NothingWithinBudgetError, Opens, Recipe, RecipeContext
from mlflow_tdeploy.core.extension import Registry

RECIPES: Registry[type[Recipe]] = Registry("recipe", discover="mlflow_tdeploy.build.recipes")

__all__ = ["RECIPES", "Graph", "Measure", "NothingWithinBudgetError", "Opens", "Recipe", "RecipeContext"]
