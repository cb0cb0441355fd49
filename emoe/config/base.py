"""What every command's settings are made of: the base class, a field with its help text, limits that several share."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

CORPUS_NAMES = ("fiction", "brown", "essays", "computing", "definitions", "python", "german", "quotes", "french")
"""Built-in corpora, those of `emoe.assets.corpora`, which printing a command's help need not import."""


def setting(default: Any, text: str, **limits: Any) -> Any:
    return Field(default, description=text, **limits)


SEEDS = {"ge": 0, "lt": 2**32}
"""What NumPy's generators take, which `transformers.set_seed` sets, too."""


_OF_ONE_RUN = {
    *("output", "resume", "overwrite", "dry_run", "accept_license", "cache_limit"),
    *("checkpoint_seconds", "checkpoint_steps", "minutes"),
}
"""Settings that say where and how work is done, not what comes out; of training, not when it is to stop early."""


class Settings(BaseModel):
    """Settings of a command. A field's description is its help text in the command line and states its unit."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("model", "output", check_fields=False)
    @classmethod
    def _from_home(cls, given: str) -> str:
        """Files and Python functions know ``~``, too."""
        return os.path.expanduser(given)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return self.model_dump(exclude=_OF_ONE_RUN)
