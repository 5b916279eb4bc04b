"""The speed of a training loop: steps and images per second, waiting for data, memory, and use of the device."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from improved_ldm.trainer.run import Run

GIB = 2**30
# Part of a device's name → its peak in bf16 without sparsity, FLOP/s. The first that fits counts. Source: the makers'
# data sheets.
PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "MI300X": 1307e12,
}
MEASURED = ("steps_per_second", "images_per_second", "seconds_left", "data_wait", "memory_gb", "mfu")


def peak_flops(name: str) -> float | None:
    """The peak of a device in bf16, FLOP/s, from its name; None if it is not in the table."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


class Meter:
    """Measures the steps between two readings, without the time between steps, such as that of samples.

    Nothing waits for the device: the times are right when it has finished, as it has when a loss is read.

    Args:
        run: configuration, folder and processes.
        flops_per_image: function that counts the floating-point operations of a training step per image, or returns
            None; it is called if the peak of the device is known.
    """

    def __init__(self, run: Run, flops_per_image: Callable[[], float | None]):
        self.device, self.processes = run.accelerator.device, run.accelerator.num_processes
        self.images_per_step, self.total_steps = run.images_per_step, run.config.training.steps
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        flops = flops_per_image() if peak else None
        self.peak_images = peak / flops if flops else None  # per second and process
        self.started, self.all_steps = time.perf_counter(), 0
        self.step_began: float | None = None
        self.seconds = self.waited = 0.0
        self.steps = 0

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time until each is there counts as waiting, and the first begins a step."""
        while True:
            began = time.perf_counter()
            self.step_began = began if self.step_began is None else self.step_began
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch

    def end_step(self):
        """Count a step."""
        self.seconds += time.perf_counter() - self.step_began
        self.steps, self.all_steps, self.step_began = self.steps + 1, self.all_steps + 1, None

    def read(self, step: int) -> dict[str, float]:
        """The values since the last reading, by the names in `MEASURED`; `mfu` only where the peak is known.

        Args:
            step: number of the last step, counted from 1.
        """
        per_second = self.steps / self.seconds
        values = {
            "steps_per_second": per_second,
            "images_per_second": per_second * self.images_per_step,
            "seconds_left": (self.total_steps - step) * (time.perf_counter() - self.started) / self.all_steps,
            "data_wait": self.waited / self.seconds,
            "memory_gb": memory_gb(self.device),
        }
        if self.peak_images:
            values["mfu"] = values["images_per_second"] / self.processes / self.peak_images
        self.seconds, self.waited, self.steps = 0.0, 0.0, 0
        return values


def memory_gb(device: torch.device) -> float:
    """Largest memory of tensors on a GPU so far, or the present memory of the process, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def measured_text(values: dict[str, Any]) -> str:
    """Values of a reading in words, for a line of a log."""
    parts = [f"{values['images_per_second']:.4g} images/s", f"{values['steps_per_second']:.3g} steps/s"]
    parts += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    parts += [f"data wait {values['data_wait']:.0%}", f"{values['memory_gb']:.1f} GiB"]
    return ", ".join(parts)
