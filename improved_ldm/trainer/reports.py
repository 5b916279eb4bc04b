"""What a run tells: a progress bar, trackers, the loss curve."""

import json
import math
import time
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from improved_ldm.trainer.run import Run

matplotlib.use("Agg")
from matplotlib import pyplot


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: the run cannot go on, its last checkpoint is whole."""


class Progress:
    """Counts images, shows a bar, keeps losses on the device until a log step, then records them.

    Args:
        run: configuration, folder and processes.
        start: step that the run goes on from.
    """

    def __init__(self, run: Run, start: int):
        self.run, self.step, self.history_file = run, start, run.folder / "history.jsonl"
        self.losses: list[torch.Tensor] = []
        self.records: list[dict[str, float]] = []
        self.last_time, self.last_step = time.perf_counter(), start
        if run.accelerator.is_main_process:
            self._drop_records_after(start)
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
        for tracker in self.run.accelerator.trackers:  # `end_training` would end the processes' group as well
            tracker.finish()

    def after_step(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float):
        """Note a step; at log steps read the losses, check that they are finite and record them.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        self.step = step
        self.losses.append(loss)
        self.bar.update(self.run.images_per_step)
        if step % self.run.config.training.log_every and step != self.run.config.training.steps:
            return
        losses = torch.stack(self.losses).mean()
        loss_value = self.run.accelerator.reduce(losses, "mean").item()
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(f"the loss is {loss_value} within {len(self.losses)} steps before step {step}")
        now = time.perf_counter()
        images = (step - self.last_step) * self.run.images_per_step
        record = {
            "step": step,
            "images": step * self.run.images_per_step,
            "loss": loss_value,
            "gradient_norm": float(gradient_norm),
            "learning_rate": learning_rate,
            "images_per_second": images / (now - self.last_time),
        }
        self.losses, self.last_time, self.last_step = [], now, step
        self.records.append(record)
        self.bar.set_postfix(loss=f"{loss_value:.4f}")
        self.run.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)

    def flush(self):
        """Append what was recorded to the history file."""
        if self.run.accelerator.is_main_process and self.records:
            with self.history_file.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.records = []

    def _drop_records_after(self, step: int):
        records = [record for record in read_history(self.history_file) if record["step"] <= step]
        self.history_file.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_history(file: Path) -> list[dict[str, float]]:
    """The records of a run, one a log step."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plot_loss(history: list[dict[str, float]], file: Path):
    """Draw the loss against the images seen, on logarithmic axes."""
    images, losses = [record["images"] for record in history], [record["loss"] for record in history]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(images, losses)
    axes.set(xscale="log", yscale="log", xlabel="images seen", ylabel="training loss, mean of a log interval")
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
