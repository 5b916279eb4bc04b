"""The sampling loop and the state of its scheduler."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from torch.testing import assert_close

from improved_ldm import ImprovedLDMPipeline

SCHEDULERS = [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler]


def draw(pipe, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    return pipe(class_labels=1, num_inference_steps=steps, generator=generator, output_type="latent").images


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_calls_in_threads_draw_what_they_draw_alone(class_pipeline, kind):
    pipe = class_pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    shared = ImprovedLDMPipeline.from_pipe(pipe)  # a pipeline with the same scheduler
    shared.set_progress_bar_config(disable=True)
    jobs = [(each, seed, steps) for seed, steps in enumerate((3, 8, 5, 12)) for each in (pipe, shared)]
    alone = [draw(*job) for job in jobs]
    barrier = Barrier(len(jobs))

    def together(job):
        barrier.wait()
        return draw(*job)

    with ThreadPoolExecutor(len(jobs)) as threads:
        for _ in range(3):
            for drawn, expected in zip(threads.map(together, jobs), alone, strict=True):
                assert_close(drawn, expected, rtol=0, atol=0)


def test_a_call_leaves_the_scheduler_as_it_was(class_pipeline):
    pipe = class_pipeline()
    before = {name: value for name, value in vars(pipe.scheduler).items() if isinstance(value, int | float | None)}
    draw(pipe, 0, 3)
    assert {name: getattr(pipe.scheduler, name) for name in before} == before
