"""What every section of a farm file is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    # The descriptions below the fields are read by inventory.schema when it needs them, and the
    # validators of the parts are built with the whole farm's: both are time off every command.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
