"""Several processes at one job: started by `accelerate launch`, or one process alone, to which all this is nothing.

Every process holds the same model and its own share of the text; sums over text are added up over all processes, so
that each goes on with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


class Group:
    """This process among those that share the job.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            if torch.cuda.is_available() and not torch.distributed.is_initialized():
                torch.distributed.init_process_group("cpu:gloo,cuda:nccl")  # we sum tensors of either kind
            state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.size = state.process_index, state.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def total(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in order of rank; small Python objects and CPU tensors."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def first_then_all(self, action: Callable[[], Any]) -> Any:
        """`action` in the first process, then its result, or the exception it raised, in all of them."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
