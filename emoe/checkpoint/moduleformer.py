"""config.json of a ModuleFormer, checked before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emoe.checkpoint.converted import Changed, Groups, checked
from emoe.checkpoint.limits import check_sizes
from emoe.plainfiles import read_json


class _ModuleFormer(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    n_layer: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    n_head: int = Field(ge=1)
    att_hidden: int = Field(ge=1)
    ffd_hidden: int = Field(ge=1)
    n_att_experts: int = Field(ge=1)
    n_mlp_experts: int = Field(ge=1)
    k_att: int = Field(ge=1)
    k_mlp: int = Field(ge=1)
    att_groups: list[Groups] | None = None
    mlp_groups: list[Groups] | None = None
    gate_type: str = "mlp"
    emoe_provenance: Changed | None = None

    @model_validator(mode="after")
    def _one_group_a_layer(self) -> _ModuleFormer:
        for groups in (self.att_groups, self.mlp_groups):
            if groups is not None and len(groups) != self.n_layer:
                raise ValueError(f"groups of {len(groups)} layers where n_layer is {self.n_layer}")
        return self


def read_moduleformer(folder: Path, flag: str = "--model") -> dict[str, Any]:
    """config.json of a ModuleFormer, with the sizes that surgery and `emoe inspect` rely on.

    Raises:
        UserError: it lacks one of them, or says what no model has.
    """
    path = folder / "config.json"
    config = read_json(path, flag)
    check_sizes(config, path, flag)
    checked(_ModuleFormer, config, f"{flag}: {path}", "write it again")
    return config
