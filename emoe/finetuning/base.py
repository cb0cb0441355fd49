"""What all our uses of transformers' Trainer share: settings, and a stop at the first number that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from emoe.errors import UserError
from emoe.finetuning.states import keep_latest, states
from emoe.runtime import multiplies_bfloat16_fast


def trains_in_bfloat16(precision: str) -> bool:
    """Whether --precision means bfloat16 here: "auto" does where the hardware multiplies it, without emulation.

    Raises:
        UserError: it is asked for on a GPU that does not know it.
    """
    if not torch.cuda.is_available():
        return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16_fast())
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bfloat16: this GPU does not know it; give float32 or auto")
    return precision == "bfloat16" or (precision == "auto" and torch.cuda.is_bf16_supported(including_emulation=False))


def shared_arguments(precision: str) -> dict[str, Any]:
    """Of `TrainingArguments`, what is the same for every training."""
    on_cpu = not torch.cuda.is_available()
    return {
        "bf16": trains_in_bfloat16(precision),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


class LogAtSaves(TrainerCallback):
    """Every state ends a line of the log: a mean over steps on both sides of it could not be gone on with."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class BaseTrainer(Trainer):
    """Trainer without output of its own that stops before a number that is none reaches the weights or a state.

    Raises:
        UserError: from `train`, in all processes, or one would wait for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(LogAtSaves())

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._stop_unless_finite("loss", loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)  # FSDP gives a DTensor
        self._stop_unless_finite("gradient's norm", whole.detach(), self.state.global_step + 1)
        return norm

    def _save_checkpoint(self, model, trial):
        self.check_weights()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:  # not by the Trainer's save_total_limit, of whose removals a kill leaves half a state
            keep_latest(Path(self.args.output_dir), self.state)

    def check_weights(self) -> None:
        """Raise `UserError` if a trained weight is no number, as after a far too long step along finite gradients."""
        largest = torch.zeros((), device=self.args.device)
        for weight in self.model.parameters():
            local = (weight.to_local() if hasattr(weight, "to_local") else weight).detach()  # FSDP has DTensors
            if weight.requires_grad and local.numel():
                largest = torch.maximum(largest, torch.linalg.vector_norm(local, float("inf")).to(largest))
        self._stop_unless_finite("largest weight", largest, self.state.global_step)

    def _stop_unless_finite(self, name: str, value: torch.Tensor, step: int) -> None:
        if self.accelerator.num_processes > 1:  # a sum keeps what is no number
            value = self.accelerator.reduce(value.float().reshape(1).to(self.args.device), "sum")
        if not torch.isfinite(value).all():
            kept = states(Path(self.args.output_dir))
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"the {name} is {value.item()} in step {step}: lower --learning-rate and add --overwrite; {where}"
            )
