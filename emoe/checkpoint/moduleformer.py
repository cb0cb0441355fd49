"""config.json of a ModuleFormer, checked before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from emoe.checkpoint.converted import Changed, Groups, checked
from emoe.checkpoint.limits import LARGEST, check_sizes
from emoe.errors import UserError
from emoe.plainfiles import read_json

Experts = Annotated[int, Field(ge=1, le=LARGEST["num_experts"])]


class _ModuleFormer(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    n_layer: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    n_head: int = Field(ge=1)
    att_hidden: int = Field(ge=1)
    ffd_hidden: int = Field(ge=1)
    n_att_experts: Experts
    n_mlp_experts: Experts
    k_att: int
    k_mlp: int
    sample_topk: int = 0
    att_groups: list[Groups] | None = None
    mlp_groups: list[Groups] | None = None
    gate_type: str = "mlp"
    emoe_provenance: Changed | None = None


def read_moduleformer(folder: Path, flag: str = "--model") -> dict[str, Any]:
    """config.json of a ModuleFormer, with the sizes that surgery and `emoe inspect` rely on.

    Raises:
        UserError: it lacks one of them, says what no model has, or contradicts itself.
    """
    from emoe.modeling.configuration_moduleformer import ModuleFormerConfig  # takes a second to import

    path = folder / "config.json"
    config = read_json(path, flag)
    check_sizes(config, path, flag)
    checked(_ModuleFormer, config, f"{flag}: {path}", "write it again")
    try:
        ModuleFormerConfig(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag}: {path}: {' '.join(str(error).split())[:200]}; write it again") from None
    return config
