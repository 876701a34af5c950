"""What all parts of ``tdeploy.yaml`` have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of the file: no unknown keys, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
