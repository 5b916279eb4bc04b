"""Reports of a run: a progress bar, trackers, the history of the loss."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from improved_ldm.output import writing
from improved_ldm.provenance import read_json_lines, write_json_lines
from improved_ldm.trainer.checkpoints import HISTORY
from improved_ldm.trainer.nonfinite import NonFiniteLossError
from improved_ldm.trainer.run import Run


class Progress:
    """Counts images, shows a bar, keeps losses on the device until a log step, then records them.

    Args:
        run: configuration, folder and processes.
        start: step that the run resumes from.
        state: result of `state_dict` at that step; empty if there is none.
    """

    def __init__(self, run: Run, start: int, state: dict[str, Any] | None = None):
        self.run, self.step, self.history_file = run, start, run.folder / HISTORY
        losses = (state or {}).get("losses", [])
        run.clock.earlier = (state or {}).get("seconds", 0.0)  # checkpoints of earlier versions have none
        self.losses = [torch.tensor(loss, device=run.accelerator.device) for loss in losses]
        self.records: list[dict[str, Any]] = []
        self.last_time, self.last_step = time.perf_counter(), start
        self.skipped_in_a_row = 0  # until the last log step
        if run.accelerator.is_main_process:
            goes_on = start < run.config.training.steps  # then the losses since the last log step are logged again
            self._drop_records_after(start - len(losses) * goes_on)
        self.skipped_steps = count_skipped(read_history(self.history_file, self.run.say))
        per_step = run.images_per_step
        self.bar = tqdm(
            total=run.config.training.steps * per_step,
            initial=start * per_step,
            unit="img",
            desc="training",
            disable=not run.accelerator.is_local_main_process,
        )

    def __enter__(self):
        if self.run.config.training.trackers:
            settings = json.dumps(self.run.config.model_dump())  # trackers take flat values only
            self.run.accelerator.init_trackers("improved_ldm", config={"config": settings})
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.flush()
        for tracker in self.run.accelerator.trackers:  # `end_training` would also end the process group
            tracker.finish()

    def after_step(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> bool:
        """Count a step; at log steps read the losses, count the skipped steps, and record both.

        Args:
            step: step, counted from 1.
            loss: loss of the step, a scalar on the device; NaN on every process if the step was skipped.
            gradient_norm: gradient norm of the step, on the device.
            learning_rate: learning rate of the step.

        Returns:
            Whether this is a log step and steps were skipped since the previous one.
        """
        self.step = step
        self.losses.append(loss)
        self.bar.update(self.run.images_per_step)
        if step % self.run.config.training.log_every and step != self.run.config.training.steps:
            return False
        losses = torch.stack(self.losses)
        finite = losses.isfinite()  # the same on all processes
        loss_value = self.run.accelerator.reduce(losses[finite].mean(), "mean").item()
        skipped = self._count_skipped(finite.tolist())
        now = time.perf_counter()
        images = (step - self.last_step) * self.run.images_per_step
        record = {
            "step": step,
            "images": step * self.run.images_per_step,
            "loss": _or_none(loss_value),
            "gradient_norm": _or_none(float(gradient_norm)),
            "learning_rate": learning_rate,
            "images_per_second": images / (now - self.last_time),
        }
        if skipped:
            record["skipped_steps"] = skipped
        self.last_time, self.last_step = now, step
        if step % self.run.config.training.log_every == 0:  # else a longer run still needs them for its next log step
            self.losses = []
        self.records.append(record)
        self.bar.set_postfix(loss=f"{loss_value:.4f}")
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self.run.accelerator.log(values, step=step)
        return bool(skipped)

    def _count_skipped(self, finite: list[bool]) -> int:
        """Number of skipped steps since the last log step, from whether the losses are finite."""
        for is_finite in finite:
            self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        skipped = finite.count(False)
        self.skipped_steps += skipped
        if skipped:
            which = f"{skipped} of the last {len(finite)} steps" if any(finite) else f"all of the last {skipped} steps"
            self.run.say(
                f"step {self.step}: {which} skipped, {self.skipped_steps} in all; their loss or gradient is NaN or "
                "infinite"
            )
        return skipped

    def check_skipped(self):
        """Raise a NonFiniteLossError if more than `max_skipped_steps`, or half of the run, were skipped in a row."""
        training = self.run.config.training
        if self.skipped_in_a_row > min(training.max_skipped_steps, training.steps // 2):
            raise NonFiniteLossError(
                f"the last {self.skipped_in_a_row} steps until step {self.step} of {training.steps} were skipped: "
                "their loss or gradient is NaN or infinite. `training.max_skipped_steps` is "
                f"{training.max_skipped_steps}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The losses of this rank since the last log step, so that a resumed run logs the same values.

        The state also has the seconds of the run in all its parts.
        """
        losses = torch.stack(self.losses).tolist() if self.losses else []
        return {"losses": losses, "seconds": self.run.clock.seconds()}

    def flush(self):
        """Append what was recorded to the history file.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.run.accelerator.is_main_process and self.records:
            with writing(self.history_file), self.history_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.records = []

    def _drop_records_after(self, step: int):
        records = [record for record in read_history(self.history_file, self.run.say) if record["step"] <= step]
        with writing(self.history_file):
            write_json_lines(self.history_file, records)


def read_history(file: Path, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The records of a run, one per log step.

    Args:
        file: of `Progress`.
        say: called with a message for each damaged line, which is left out.
    """
    return [record for record in read_json_lines(file, on_damage=say) if "step" in record]


def count_skipped(history: list[dict[str, Any]]) -> int:
    """Number of skipped steps of a run."""
    return sum(record.get("skipped_steps", 0) for record in history)


def last_loss(history: list[dict[str, Any]]) -> float | None:
    """The last logged loss; None if there is none."""
    return next((record["loss"] for record in reversed(history) if record["loss"] is not None), None)


def _or_none(value: float) -> float | None:
    """A value for JSON, which has no NaN; None if it is not finite."""
    return value if math.isfinite(value) else None
