"""Reports of a run: a progress bar, lines of the log, trackers, the history of the loss."""

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
from improved_ldm.trainer.bars import LINE_SECONDS, duration_text
from improved_ldm.trainer.checkpoints import HISTORY
from improved_ldm.trainer.meter import Meter, measured_text
from improved_ldm.trainer.nonfinite import NonFiniteLossError
from improved_ldm.trainer.run import Run

LINES = 20  # parts of a run, of which each has a line in the log


class Progress:
    """Counts images, keeps losses on the device until a log step, then records them with the speed of the training.

    In a terminal there is a bar; a line is printed at the first log step, then for each of `LINES` parts of the run,
    and at least every `LINE_SECONDS`.

    Args:
        run: configuration, folder and processes.
        start: step that the run resumes from.
        state: result of `state_dict` at that step; empty if there is none.
        flops_per_image: see `Meter`.
    """

    def __init__(
        self,
        run: Run,
        start: int,
        state: dict[str, Any] | None = None,
        flops_per_image: Callable[[], float | None] = lambda: None,
    ):
        self.run, self.step, self.history_file = run, start, run.folder / HISTORY
        losses = (state or {}).get("losses", [])
        run.clock.earlier = (state or {}).get("seconds", 0.0)  # checkpoints of earlier versions have none
        self.losses = [torch.tensor(loss, device=run.accelerator.device) for loss in losses]
        self.records: list[dict[str, Any]] = []
        self.meter = Meter(run, flops_per_image)
        self.line_step, self.line_time = -1, -LINE_SECONDS
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
            disable=None if run.accelerator.is_local_main_process else True,  # None shows it in a terminal only
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
            self.meter.end_step()
            return False
        losses = torch.stack(self.losses)
        finite = losses.isfinite()  # the same on all processes
        loss_value = self.run.accelerator.reduce(losses[finite].mean(), "mean").item()
        self.meter.end_step()  # the device has finished it
        skipped = self._count_skipped(finite.tolist())
        record = {
            "step": step,
            "images": step * self.run.images_per_step,
            "loss": finite_or_none(loss_value),
            "gradient_norm": finite_or_none(float(gradient_norm)),
            "learning_rate": learning_rate,
            **self.meter.read(step),
        }
        if skipped:
            record["skipped_steps"] = skipped
        if step % self.run.config.training.log_every == 0:  # else a longer run still needs them for its next log step
            self.losses = []
        self.records.append(record)
        self.bar.set_postfix(loss=f"{loss_value:.4f}")
        self._say_line(record)
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self.run.accelerator.log(values, step=step)
        return bool(skipped)

    def _say_line(self, record: dict[str, Any]):
        """Print a line on a record, if it is time for one."""
        step, steps, now = record["step"], self.run.config.training.steps, time.perf_counter()
        part, last_part = (LINES * one // steps for one in (step, self.line_step))
        if part > last_part or now - self.line_time > LINE_SECONDS:
            self.line_step, self.line_time = step, now
            self.run.say(log_line(record, steps))

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


def log_line(record: dict[str, Any], steps: int) -> str:
    """A record of the history in words.

    Args:
        record: a record of `Progress`.
        steps: steps of the run.
    """
    values = {name: record[name] for name in ("loss", "gradient_norm", "learning_rate")}
    shown = {name: "not finite" if value is None else f"{value:.4g}" for name, value in values.items()}
    left = f"{duration_text(record['seconds_left'])} left" if record["step"] < steps else "done"
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items()]
    return f"step {record['step']}/{steps}: {', '.join([*parts, measured_text(record), left])}"


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


def finite_or_none(value: float) -> float | None:
    """A value for JSON, which has no NaN; None if it is not finite."""
    return value if math.isfinite(value) else None
