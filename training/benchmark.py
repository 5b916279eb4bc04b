"""Compare the speed and the memory of the denoisers, and the speed of the images.

Usage: python training/benchmark.py --peers [--backbones dit unet …] [--device cuda] [--output FILE]
       python training/benchmark.py --data [--output FILE]

`--peers` compares each denoiser, with `published` conditioning, with diffusers' class for the same backbone: the same
widths and inputs, random weights, float32, eager.

`--data` makes samples of 224 × 224 pixels, numbers in [-1, 1], from images of 512 × 512 pixels in memory with
`read_image` and our transform, and compares them with two ways that decode at full size, with the `Image` feature of
`datasets`. `diffusers_example` then scales with Pillow's bicubic filter and makes tensors with torchvision, as
diffusers' example for text to image does; `image_feature` uses our transform. Times are processor times.

Every ratio is that of ours to theirs; below 1 is better.
"""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import diffusers
import numpy as np
import PIL
import torch
import torchvision
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision import transforms

from improved_ldm.data.images import read_image
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.exits import ArgumentParser, exit_on_error
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.family import make_denoiser
from improved_ldm.models.published import PublishedUNet
from improved_ldm.provenance import device_name

SIZE = "S/2"
NUM_CLASSES, TEXT_TOKENS, TEXT_DIM = 1000, 77, 768  # of ImageNet and of CLIP ViT-L/14
CONDITIONS = {  # what each backbone reads as published
    "dit": {"num_classes": NUM_CLASSES},
    "pixart": {"text_dim": TEXT_DIM},
    "mmdit": {"text_dim": TEXT_DIM, "pooled_dim": TEXT_DIM},
    "unet": {"text_dim": TEXT_DIM, "pooled_dim": TEXT_DIM},
}
LIBRARIES = (torch, torchvision, diffusers, datasets, PIL)
STORED_SIDE, SAMPLE_SIDE = 512, 224  # pixels
DIFFUSERS_EXAMPLE = transforms.Compose(
    [
        transforms.Resize(SAMPLE_SIDE, transforms.InterpolationMode.BICUBIC),
        transforms.RandomCrop(SAMPLE_SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
)
FORMATS = {"JPEG": {"quality": 90}, "WEBP": {"quality": 90}, "PNG": {}}  # with the arguments of the encoder


def make_peer(backbone: str, config: dict[str, Any]) -> nn.Module:
    """Diffusers' class for a backbone, with the sizes of our config."""

    def same(*names):
        return {name: config[name] for name in ("sample_size", "in_channels", "out_channels", *names)}

    if backbone == "unet":
        size_features = PublishedUNet.read(config["published"]).size_features
        levels = ("block_out_channels", "down_block_types", "up_block_types", "transformer_layers_per_block")
        return UNet2DConditionModel(
            **same(*levels, "layers_per_block", "use_linear_projection", "norm_num_groups"),
            attention_head_dim=config["num_attention_heads"],  # diffusers' name for the number of heads
            cross_attention_dim=config["text_dim"],
            addition_embed_type="text_time",
            addition_time_embed_dim=size_features,
            projection_class_embeddings_input_dim=config["pooled_dim"] + 6 * size_features,
        )
    width = config["hidden_size"]
    sizes = same("patch_size", "num_layers", "num_attention_heads")
    sizes["attention_head_dim"] = width // config["num_attention_heads"]
    if backbone == "dit":
        return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=config["num_classes"])
    if backbone == "pixart":
        return PixArtTransformer2DModel(**sizes, cross_attention_dim=width, caption_channels=config["text_dim"])
    return SD3Transformer2DModel(
        **sizes,
        joint_attention_dim=config["text_dim"],
        caption_projection_dim=width,
        pooled_projection_dim=config["pooled_dim"],
        pos_embed_max_size=config["sample_size"] // config["patch_size"],
        qk_norm="rms_norm" if config["qk_norm"] else None,
    )


def make_inputs(denoiser: Denoiser, backbone: str, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Random arguments of `forward` with their names in both libraries, except the latents, here called `latents`."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape):
        return torch.randn(batch_size, *shape, generator=generator, device=device)

    def integers(high):
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    side = denoiser.config.sample_size
    inputs = {"latents": noise(denoiser.config.in_channels, side, side), "timestep": integers(1000)}
    if backbone == "dit":
        return {**inputs, "class_labels": integers(NUM_CLASSES)}
    inputs["encoder_hidden_states"] = noise(TEXT_TOKENS, TEXT_DIM)
    if backbone == "mmdit":
        inputs["pooled_projections"] = noise(TEXT_DIM)
    if backbone == "unet":
        inputs["added_cond_kwargs"] = {"text_embeds": noise(TEXT_DIM), "time_ids": 1000 * noise(6).abs()}
    return inputs


def randomize_weights(model: nn.Module):
    """Draw every weight from N(0, 0.02²), so that no path is zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)


def forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The prediction of a model of either library."""
    arguments = dict(inputs)
    return model(arguments.pop("latents"), **arguments, return_dict=False)[0]


def forward_backward(model: nn.Module, inputs: dict[str, Any]):
    """Compute the gradients of a mean squared error."""
    model.zero_grad()
    sample = forward(model, inputs)
    nn.functional.mse_loss(sample, torch.ones_like(sample)).backward()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes: processor time on the CPU, which other processes disturb less, else wall time."""
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_pair(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, device: torch.device) -> dict:
    """Times of two functions, called in the order A B B A …, after one warm-up call of each.

    Returns:
        The medians in milliseconds, and the median and the 10th and 90th percentile of the ratios of neighbours.
    """
    times = np.empty((rounds + 1, 2))  # seconds of ours and of theirs
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            times[i, side] = seconds((ours, theirs)[side], device)
    times = times[1:]
    low, ratio, high = np.percentile(times[:, 0] / times[:, 1], [10, 50, 90])
    ours_ms, theirs_ms = 1000 * np.median(times, axis=0)
    return {"ratio": ratio, "p10": low, "p90": high, "ours_ms": ours_ms, "theirs_ms": theirs_ms}


def peak_rise(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call allocates at its peak.

    On the CPU this is the highest running sum of the allocator's events in the profiler's record, which is the same in
    every run. Scratch space that oneDNN allocates for itself is not included.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *sizes]).max())


def training_peak(model: nn.Module, inputs: dict[str, Any], device: torch.device) -> int:
    """Bytes at the peak of a training step: weights, optimizer state, activations and gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        forward_backward(model, inputs)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    state = [value for values in optimizer.state.values() for value in values.values()]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *state])
    return held + peak_rise(step, device)


def compare_peers(backbone: str, batch_size: int, rounds: int, device: torch.device, **config) -> dict[str, Any]:
    """Compare a denoiser with diffusers' class for its backbone.

    Args:
        backbone: a key of `CONDITIONS`.
        batch_size: latents per batch.
        rounds: timed calls of each model.
        device: device of both models.
        config: arguments of our constructor that differ from the preset; the peer gets the same.

    Returns:
        Times of `forward` and `forward_backward` from `time_pair`, and `memory` of a training step and `parameters`,
        each as a ratio and both numbers.
    """
    ours = make_denoiser(backbone, SIZE, conditioning="published", **{**CONDITIONS[backbone], **config})
    theirs = make_peer(backbone, ours.config)
    inputs = make_inputs(ours, backbone, batch_size, device)
    for model in (ours, theirs):
        randomize_weights(model.train().to(device))

    with torch.no_grad():
        forward_times = time_pair(lambda: forward(ours, inputs), lambda: forward(theirs, inputs), rounds, device)
    training_times = time_pair(
        lambda: forward_backward(ours, inputs), lambda: forward_backward(theirs, inputs), rounds, device
    )
    ours.zero_grad()
    theirs.zero_grad()
    our_peak, their_peak = (training_peak(model, inputs, device) for model in (ours, theirs))
    our_count, their_count = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    return {
        "backbone": backbone,
        "forward": forward_times,
        "forward_backward": training_times,
        "memory": {"ratio": our_peak / their_peak, "ours_bytes": our_peak, "theirs_bytes": their_peak},
        "parameters": {"ratio": our_count / their_count, "ours": our_count, "theirs": their_count},
    }


def make_image(seed: int) -> Image.Image:
    """A square of smooth colours with grain, which compresses about as well as a photograph."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(256, size=(12, 12, 3), dtype=np.uint8)).resize((STORED_SIDE,) * 2)
    grain = rng.normal(0, 6, (STORED_SIDE, STORED_SIDE, 3))
    return Image.fromarray((np.asarray(colours) + grain).clip(0, 255).astype(np.uint8))


def compare_decoding(file_format: str, count: int, rounds: int) -> dict[str, Any]:
    """Compare the making of samples with two ways that start from the `Image` feature of `datasets`.

    Args:
        file_format: a key of `FORMATS`.
        count: images per timed call.
        rounds: timed calls of each.

    Returns:
        Times from `time_pair` against `diffusers_example` and `image_feature`, as this script describes them, and
        images per second of processor time: `ours_per_second` and the same of both.
    """
    files = []
    for seed in range(count):
        make_image(seed).save(file := io.BytesIO(), file_format, **FORMATS[file_format])
        files.append(file.getvalue())
    transform = ImageTransform(SAMPLE_SIDE, crop_position="random", flip_probability=0.5)
    feature = datasets.Image()

    def decoded(encoded):
        return feature.decode_example({"bytes": encoded, "path": None}).convert("RGB")

    def ours():
        for seed, encoded in enumerate(files):
            image, size = read_image(encoded, transform.decode_size)
            pixel_values(transform(image, Random(seed), size)[0])

    def diffusers_example():
        for encoded in files:
            DIFFUSERS_EXAMPLE(decoded(encoded))

    def image_feature():
        for seed, encoded in enumerate(files):
            pixel_values(transform(decoded(encoded), Random(seed))[0])

    others = (diffusers_example, image_feature)
    times = {other.__name__: time_pair(ours, other, rounds, torch.device("cpu")) for other in others}
    rates = {"ours_per_second": 1000 * count / times["diffusers_example"]["ours_ms"]}
    rates |= {f"{name}_per_second": 1000 * count / time["theirs_ms"] for name, time in times.items()}
    return {"format": file_format, **times, **rates}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of Markdown: a name, ratios with the 10th to 90th percentile of times, and rates."""

    def cell(value):
        if not isinstance(value, dict):
            return value if isinstance(value, str) else f"{value:.0f}"
        spread = f" ({value['p10']:.3f}–{value['p90']:.3f})" if "p10" in value else ""
        return f"{value['ratio']:.3f}{spread}"

    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--peers", action="store_true", help="compare with diffusers' class for the same backbone")
    mode.add_argument("--data", action="store_true", help="compare with diffusers' example and datasets' images")
    parser.add_argument("--backbones", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each side")
    parser.add_argument("--batch-size", type=int, default=8, help="latents or images per timed call")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    device = torch.device("cpu" if arguments.data else arguments.device)
    if arguments.data:
        rows = [compare_decoding(name, arguments.batch_size, arguments.rounds) for name in FORMATS]
    else:
        rows = [compare_peers(name, arguments.batch_size, arguments.rounds, device) for name in arguments.backbones]
    print(table(rows))
    if arguments.output is not None:
        report = {
            "device": device_name(device),
            "threads": arguments.threads,
            "versions": {library.__name__: library.__version__ for library in LIBRARIES},
            "size": {"stored": STORED_SIDE, "sample": SAMPLE_SIDE} if arguments.data else SIZE,
            "batch_size": arguments.batch_size,
            "rounds": arguments.rounds,
            "results": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_error("not measured", "batch-size"):
        main()
