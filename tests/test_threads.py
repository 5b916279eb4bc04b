"""Pipelines that share components and sample in several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from improved_ldm.conditioning.text import encode_prompts

PROMPTS = ["a boot", "a red boot with a coat and the white bag", "the blue coat", "a bag " * 12]
LENGTHS = (16, 8, 12, 5)
pytestmark = pytest.mark.filterwarnings("ignore:prompts of more than")


def at_once(*tasks):
    """The results of tasks that start together, each in its own thread."""
    start = Barrier(len(tasks))

    def run(task):
        start.wait(timeout=30)
        return task()

    with ThreadPoolExecutor(len(tasks)) as threads:
        return list(threads.map(run, tasks))


def test_threads_share_a_tokenizer(clip_text):
    tokenizer, text_encoder = clip_text

    def encode(length):
        return [encode_prompts(PROMPTS, tokenizer, text_encoder, length) for _ in range(25)]

    alone = {length: encode_prompts(PROMPTS, tokenizer, text_encoder, length) for length in LENGTHS}
    for length, encodings in zip(LENGTHS, at_once(*(lambda n=n: encode(n) for n in LENGTHS)), strict=True):
        for encoding in encodings:
            assert torch.equal(encoding.hidden_states, alone[length].hidden_states)
            assert torch.equal(encoding.attention_mask, alone[length].attention_mask)


def test_pipelines_that_share_a_text_encoder_draw_in_threads_what_they_draw_alone(text_pipeline):
    names, padding = ("dit", "pixart", "mmdit", "unet"), ("mask", "replicate", "zero", "noisy_replicate")
    pipes = [
        text_pipeline(name=name, max_text_tokens=length, text_padding=way)
        for name, length, way in zip(names, LENGTHS, padding, strict=True)
    ]

    def draw(pipe, times):
        def once():
            generator = torch.Generator().manual_seed(7)
            return pipe(prompt=PROMPTS, generator=generator, output_type="pt").images

        return lambda: [once() for _ in range(times)]

    alone = [draw(pipe, 1)()[0] for pipe in pipes]
    for pictures, picture in zip(at_once(*(draw(pipe, 5) for pipe in pipes)), alone, strict=True):
        assert all(torch.equal(other, picture) for other in pictures)
