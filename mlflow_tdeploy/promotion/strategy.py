"""How a version comes to answer everybody: at once, or after it was tried out beside the one that serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, model_validator

from mlflow_tdeploy.core.rollout import Kind
from mlflow_tdeploy.deploy.tryout import Tryout
from mlflow_tdeploy.promotion.part import Part


class Trying(Part):
    """How a version is tried out, and what is too bad.

    Attributes:
        percent: Of the requests, how many it gets.
        minutes: For how long.
        requests: How many it has to have got by then, else nobody knows; from so many on, what is too bad ends it.
        errors: Share of them to which it may have no answer.
        slower: How many times as long the 95th percentile of its times may be.
        agreement: Share of them that have to be answered alike, see :func:`mlflow_tdeploy.core.rollout.alike`; 0 for a
            version that answers otherwise on purpose.
    """

    percent: float = Field(default=10.0, gt=0, le=100)
    minutes: float = Field(default=10.0, gt=0)
    requests: int = Field(default=50, ge=1)
    errors: float = Field(default=0.01, ge=0, le=1)
    slower: float = Field(default=2.0, gt=0)
    agreement: float = Field(default=0.9, ge=0, le=1)


class Shadow(Trying):
    """It gets copies, by default of all requests, and answers nobody."""

    percent: float = Field(default=100.0, gt=0, le=100)


class Strategy(Part):
    """``switch``, which is no key, or one of the two.

    Attributes:
        canary: It answers some of the requests.
        shadow: It gets copies.
    """

    canary: Trying | None = None
    shadow: Shadow | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_word(cls, given: Any) -> Any:
        if given == "switch":
            return {}
        if isinstance(given, str):
            return {given: {}}
        if isinstance(given, Mapping):
            return {key: {} if value is None else value for key, value in given.items()}
        return given

    @model_validator(mode="after")
    def _is_one(self) -> Strategy:
        if self.canary and self.shadow:
            raise ValueError("a version is tried out in one way: canary or shadow")
        return self

    @property
    def _chosen(self) -> tuple[Kind, Trying] | None:
        return ("canary", self.canary) if self.canary else ("shadow", self.shadow) if self.shadow else None

    @property
    def is_tryout(self) -> bool:
        """Whether a version is tried out."""
        return self._chosen is not None

    def __str__(self) -> str:
        if self._chosen is None:
            return "switch"
        kind, how = self._chosen
        return f"{kind} on {how.percent:g} % of the requests for {how.minutes:g} min"

    def tryout(self, go_on: Callable[[], None]) -> Tryout | None:
        """Return how a version is tried out; None where it is not.

        Args:
            go_on: Raises where somebody wants it to end.
        """
        if self._chosen is None:
            return None
        kind, how = self._chosen
        return Tryout(
            kind, how.percent / 100, how.minutes * 60, how.requests, how.errors, how.slower, how.agreement, go_on
        )
