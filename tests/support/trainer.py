"""A stand-in for `emoe finetune` that writes a made-up run folder at once."""

from __future__ import annotations

from pathlib import Path

from support.runs import write_run

from emoe.errors import UserError

ARMS = ("vanilla", "emoe", "random", "dropout")
BEST_RATE = {"vanilla": 5e-5, "emoe": 2e-5}
EFFECT = {"emoe": 0.4}


class FakeTrainer:
    """Notes what it was asked for. Validation favours `BEST_RATE`; the test sets favour the other rate."""

    def __init__(self, fail: tuple[str, int] | None = None, readings=("as-trained",)) -> None:
        self.fail, self.readings = fail, readings
        self.asked: list[tuple[str, int]] = []

    def __call__(self, config, progress, say) -> None:
        seed = config.seed_list()[0]
        self.asked.append((Path(config.output).name, seed))
        if self.fail == (config.method, seed):
            raise UserError("the loss is nan in step 3") if seed % 2 else RuntimeError("out of memory")
        progress("training", 1, 2)
        best = config.learning_rate in (None, BEST_RATE.get(config.method))
        write_run(
            Path(config.output),
            arm=ARMS.index(config.method),
            effect=EFFECT.get(config.method, 0.0) + (0.0 if best else 0.5),
            seeds=[seed],
            readings=self.readings,
            validation=0.9 if best else 0.8,
            method=config.method,
            settings=config.model_dump(mode="json", exclude={"output", "resume", "overwrite"}),
            train_examples=config.train_limit or 9000,
        )
