"""Which version an alias or a stage stands for, changed so that it can be taken back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, first_line
from mlflow_tdeploy.promotion.registry import alias_of, versions_of
from mlflow_tdeploy.promotion.spec import STAGES, Rule

_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class Label:
    """An alias or a stage.

    Attributes:
        kind: Which of the two.
        name: Its name.
    """

    kind: str
    name: str

    @classmethod
    def of(cls, alias: str, stage: str) -> Label:
        """Return the one that is said.

        Raises:
            InvalidInputError: Both or none are said, or there is no such stage.
        """
        if bool(alias) == bool(stage):
            raise InvalidInputError("Say an alias or a stage, one of the two.")
        if stage and stage not in STAGES:
            raise InvalidInputError(f"There is no stage {stage!r}. There are: {', '.join(STAGES)}.")
        return cls("alias", alias) if alias else cls("stage", stage)

    @classmethod
    def of_rule(cls, rule: Rule) -> Label:
        """Return the one that a rule goes by."""
        return cls("alias", rule.alias) if rule.alias else cls("stage", rule.stage)

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"

    @contextlib.contextmanager
    def moved(self, client: MlflowClient, model: str, version: int) -> Iterator[None]:
        """Have it stand for a version; where the body fails, for what it stood for before, unless it was moved again.

        Raises:
            NotFoundError: There is no such version.
            MlflowException: The registry refuses.
        """
        try:
            client.get_model_version(model, str(version))
        except MlflowException as error:
            raise NotFoundError(
                f"There is no version {version} of '{model}' in the registry (any more), so {self} cannot stand for "
                f"it: {first_line(error)}"
            ) from error
        before = _alias_of(client, model, self.name) if self.kind == "alias" else None
        staged = _staged(client, model, self.name, version) if self.kind == "stage" else {}
        try:  # the registry may have done what it was asked though the answer is lost
            if self.kind == "alias" and before != version:
                client.set_registered_model_alias(model, self.name, str(version))
            elif self.kind == "stage" and staged != {version: self.name}:
                client.transition_model_version_stage(model, str(version), self.name, archive_existing_versions=True)
            yield
        except BaseException:
            try:
                if self.kind == "alias":
                    _give_back_alias(client, model, self.name, version, before)
                else:
                    _give_back_stages(client, model, self.name, version, staged)
            except MlflowException as error:
                _log.warning("The %s of '%s' stays with version %s: %s", self, model, version, first_line(error))
            raise


def _alias_of(client: MlflowClient, model: str, alias: str) -> int | None:
    return alias_of(client.get_registered_model(model), alias)


def _give_back_alias(client: MlflowClient, model: str, alias: str, version: int, before: int | None) -> None:
    if before == version or _alias_of(client, model, alias) != version:
        return
    if before is None:
        client.delete_registered_model_alias(model, alias)
    else:
        client.set_registered_model_alias(model, alias, str(before))


def _staged(client: MlflowClient, model: str, stage: str, version: int) -> dict[int, str]:
    """Return the stages of all that is touched where one version is put into a stage, as others are archived."""
    staged = {int(one.version): one.current_stage for one in versions_of(client, model)}
    return {one: was for one, was in staged.items() if one == version or was == stage}


def _give_back_stages(client: MlflowClient, model: str, stage: str, version: int, touched: dict[int, str]) -> None:
    if touched == {version: stage} or client.get_model_version(model, str(version)).current_stage != stage:
        return
    for one, was in touched.items():
        client.transition_model_version_stage(model, str(one), was)
