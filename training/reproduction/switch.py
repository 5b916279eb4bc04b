"""The change of resolution: FID against images seen after it, by what is done at the switch.

A low-resolution stage is trained once a seed, and gone on from at the high resolution once an arm. Stages and arms are
kept as they end. Several processes can share an output folder: give each its own seeds, or arms whose low-resolution
stage is there.
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.autoencoder import spatial_factor
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import CropPolicy
from improved_ldm.diffusion.objectives import Objective, make_objective
from improved_ldm.embedded import resolve
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import NUM_REAL_IMAGES, RealImages, draw, load_real_images
from improved_ldm.evaluation.scores import frechet_distance
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.presets import denoiser_class
from improved_ldm.provenance import device_name, write_json
from improved_ldm.trainer.batches import open_batches, survey
from improved_ldm.trainer.components import build_denoiser, load_autoencoder, load_text_encoder, text_dims
from improved_ldm.trainer.config import RunConfig, parse_config_or_exit
from improved_ldm.trainer.loop import train
from improved_ldm.trainer.run import Run, start_run
from improved_ldm.transfer import transfer
from reproduction.intervals import DESCRIPTION, mean_and_interval

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator, NullLocator

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# What differs from the quickstart; `--section.key value` on the command line wins.
SETTING = {
    "transform.crop_policy": "resize_then_crop",
    "transform.min_crop": 1.0,
    "transform.reduce_probability": 0.0,
    "objective.prediction": "epsilon",
    "cache.passes": 1,
    "denoiser.options": "{patch_size: 1, hidden_size: 96, num_attention_heads: 3}",  # 4x4 tokens, then 8x8
    "training.steps": 240,
    "training.batch_size": 64,
    "training.checkpoint_every": 1000,
    "training.log_every": 50,
    "training.trackers": "[]",
    "optimizer.ema_decay": 0.98,
    "sampling.every": 60,
    "sampling.guidance_scale": 1.0,
    "sampling.num_inference_steps": 15,
    "evaluation.num_coverage_samples": 500,
}


@dataclass(frozen=True)
class Arm:
    """One way to change the resolution.

    Args:
        positions: of `transfer`.
        noise: of `transfer`.
        low_policy: crop policy of the low-resolution stage.
    """

    positions: str
    noise: str
    low_policy: CropPolicy = "resize_then_crop"


ARMS = {
    "default": Arm("keep", "keep"),
    "positions": Arm("resample", "keep"),
    "noise": Arm("keep", "rescale"),
    "both": Arm("resample", "rescale"),
    "crops": Arm("resample", "rescale", "crop_at_target_scale"),
    "crops_default": Arm("keep", "keep", "crop_at_target_scale"),
}
PANELS = {  # title → arm → its name in the legend
    "What is done at the switch": {
        "default": "default: nothing",
        "noise": "noise rescaled",
        "positions": "positions resampled",
        "both": "both",
    },
    "What the low-resolution stage sees": {
        "both": "whole images; both",
        "crops": "crops at the higher resolution's scale; both",
        "crops_default": "crops at the higher resolution's scale; nothing",
    },
}


class Transfers:
    """The arms of a change of resolution, and what they share.

    Args:
        config: of the high-resolution stage; every run has its own folder and seed.
        from_resolution: pixels a side of the low-resolution stage.
        from_steps: of the low-resolution stage.
        output: where everything goes.
    """

    def __init__(self, config: RunConfig, from_resolution: int, from_steps: int, output: Path):
        self.config, self.from_resolution, self.from_steps, self.output = config, from_resolution, from_steps, output
        data = config.data
        self.rows = open_rows(data.source, data.split, data.name, data.image_column, data.caption_column)
        self.vae = load_autoencoder(config.autoencoder)
        self.encoder = SampleEncoder(self.vae, *load_text_encoder(config.text), config.text.max_tokens)
        self.objective = make_objective(**config.objective.model_dump())

    def curve(self, name: str, seed: int) -> Path:
        """The file with the curve of an arm; the arm is trained if it is not there."""
        file, arm, started = self.output / "arms" / f"{name}-seed{seed}.json", ARMS[name], time.perf_counter()
        config = self.config.model_dump(mode="json", exclude={"output_dir", "seed"})
        settings = {"from_resolution": self.from_resolution, "from_steps": self.from_steps, "config": config}
        if file.exists():
            if json.loads(file.read_text())["settings"] != settings:
                raise SystemExit(f"{file} has other settings; choose another --output, or delete it.")
            return file
        resolution, low = self.config.transform.resolution, self._low_stage(arm, seed)
        load, factor = denoiser_class(self.config.denoiser.name).from_pretrained, spatial_factor(self.vae)
        raw, averaged = (
            transfer(load(low / kind), resolution, arm.positions, arm.noise, factor) for kind in ("raw", "averaged")
        )
        rescales = arm.noise == "rescale"
        objective = self.objective.rescaled(self.from_resolution, resolution) if rescales else self.objective
        run = self._start(f"{name}-seed{seed}", seed, self.config.training.steps)
        pipeline, points_file = self._pipeline(objective), run.folder / "points.json"
        points = json.loads(points_file.read_text()) if points_file.exists() else {}

        def measure(denoiser: Denoiser, step: int):
            pipeline.denoiser = denoiser
            points[str(step)] = {"images": step * run.images_per_step, "fid": self._fid(pipeline, seed)}
            write_json(points_file, points)
            run.say(f"{name}, seed {seed}: {points[str(step)]}")

        if not points:
            measure(averaged.to(run.accelerator.device).eval(), 0)
        train(run, raw, objective, open_batches(run, self.rows, self.encoder), measure, averaged=averaged)
        result = {
            "arm": name,
            "seed": seed,
            "device": device_name(run.accelerator.device),
            "sampler": type(pipeline.scheduler).__name__,
            "seconds": round(time.perf_counter() - started, 1),
            "settings": settings,
            "points": [points[step] for step in sorted(points, key=int)],
        }
        write_json(file, result)
        shutil.rmtree(run.folder)
        return file

    def _low_stage(self, arm: Arm, seed: int) -> Path:
        """The folder of the raw and the averaged denoiser of a low-resolution stage, trained if it is not there."""
        folder = self.output / "low" / f"{arm.low_policy}-seed{seed}"
        if not folder.exists():
            scale = self.config.transform.resolution if arm.low_policy == "crop_at_target_scale" else None
            transform = {"resolution": self.from_resolution, "crop_policy": arm.low_policy, "target_scale": scale}
            run = self._start(f"low-{folder.name}", seed, self.from_steps, **transform)
            denoiser = build_denoiser(run.config, self.vae, **text_dims(run.config.denoiser, self.encoder))
            averaged = train(run, denoiser, self.objective, open_batches(run, self.rows, self.encoder))
            for kind, model in (("raw", denoiser), ("averaged", averaged)):
                model.save_pretrained(run.folder / "models" / kind)
            folder.parent.mkdir(exist_ok=True)
            (run.folder / "models").rename(folder)
            shutil.rmtree(run.folder)
        return folder

    def _start(self, name: str, seed: int, steps: int, **transform) -> Run:
        """A run of the configuration with its own folder, seed, length and transform."""
        update = {
            "output_dir": str(self.output / "work" / name),
            "seed": seed,
            "transform": self.config.transform.model_copy(update=transform),
            "cache": self.config.cache.model_copy(update={"folder": str(self.output / "cache")}),
            "training": self.config.training.model_copy(update={"steps": steps}),
        }
        run = start_run(self.config.model_copy(update=update))
        for model in (self.vae, self.encoder.text_encoder):
            model.to(run.accelerator.device)
        return run

    def _pipeline(self, objective: Objective) -> ImprovedLDMPipeline:
        """A pipeline that lacks its denoiser."""
        text, sampling = self.config.text, self.config.sampling
        pipeline = ImprovedLDMPipeline(
            self.vae,
            objective.sampling_scheduler(),
            text_encoder=self.encoder.text_encoder,
            tokenizer=self.encoder.tokenizer,
            text_padding=text.padding,
            text_noise_scale=text.noise_scale,
            max_text_tokens=text.max_tokens,
            default_original_size=survey(self.rows).original_side,
            default_guidance_scale=sampling.guidance_scale,
            default_num_inference_steps=sampling.num_inference_steps,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    @torch.no_grad()
    def _reference(self) -> tuple[Judge, RealImages, torch.Tensor]:
        """The judge, whole test images, and their features."""
        judge = Judge.from_pretrained(resolve(self.config.evaluation.judge)).eval()
        rows = open_rows(self.config.data.source, "test", label_column="label")
        real = load_real_images(rows, self.config.transform.resolution, NUM_REAL_IMAGES)
        return judge, real, judge.features(real.pixels)

    @torch.no_grad()
    def _fid(self, pipeline: ImprovedLDMPipeline, seed: int) -> float:
        judge, real, real_features = self._reference
        prompts, labels = real.prompts(self.config.evaluation.num_coverage_samples)
        return frechet_distance(real_features, judge.features(draw(pipeline, prompts, labels, seed * len(prompts))))


def images_to_reach(images: list[int], fids: np.ndarray, target: float) -> float | None:
    """Where a curve, straight between its points, first comes down to a target; None if it does not."""
    reached = np.flatnonzero(fids <= target)
    if not len(reached):
        return None
    after = reached[0]
    span = slice(after, after + 1) if after == 0 else slice(after - 1, after + 1)
    return float(np.interp(-target, -fids[span], images[span]))


def against_default(images: list[int], seeds: dict[int, np.ndarray], default: dict[int, np.ndarray]) -> dict[str, Any]:
    """What an arm needs to reach the last FID of the default, as images and as a share of the default's images."""
    shared = [seed for seed in seeds if seed in default]
    curves = {str(seed): (seeds[seed], default[seed][-1]) for seed in shared}
    curves["mean"] = tuple(np.mean([parts[i] for parts in curves.values()], axis=0) for i in (0, 1))
    needed = {key: images_to_reach(images, *curve) for key, curve in curves.items()}
    return {
        "images_to_last_default_fid": needed,
        "as_share_of_budget": {key: None if count is None else count / images[-1] for key, count in needed.items()},
        "last_fid_minus_default": mean_and_interval(
            np.array([seeds[seed][-1] - default[seed][-1] for seed in shared])
        ),
    }


def summarize(files: list[Path]) -> dict[str, Any]:
    """The curves of all arms, and what each needs to reach the last FID of the default.

    Raises:
        ValueError: for arms with different settings.
    """
    results = [json.loads(file.read_text()) for file in sorted(files)]
    settings, images = results[0]["settings"], [point["images"] for point in results[0]["points"]]
    if any(result["settings"] != settings for result in results):
        raise ValueError("the arms were made with different settings.")
    curves = {name: {} for name in ARMS if any(result["arm"] == name for result in results)}
    for result in results:
        curves[result["arm"]][result["seed"]] = np.array([point["fid"] for point in result["points"]])
    config = settings["config"]
    return {
        "fid": {
            "features": config["evaluation"]["judge"],
            "reference": f"first {NUM_REAL_IMAGES} test images of {config['data']['source']}, whole",
            "resolution": config["transform"]["resolution"],
            "samples": config["evaluation"]["num_coverage_samples"],
            "prompts": "captions of test images, the classes in turn",
            "model": "averaged weights, float32",
            "sampler": results[0]["sampler"],
            "steps": config["sampling"]["num_inference_steps"],
            "guidance_scale": config["sampling"]["guidance_scale"],
        },
        "interval": DESCRIPTION,
        "devices": sorted({result["device"] for result in results}),
        "images_before_switch": settings["from_steps"] * config["training"]["batch_size"],
        "images": images,
        "arms": {
            name: {
                **vars(ARMS[name]),
                "fid_of_seeds": {str(seed): fids.tolist() for seed, fids in seeds.items()},
                "fid": mean_and_interval(np.stack(list(seeds.values()))),
                **(against_default(images, seeds, curves["default"]) if "default" in curves else {}),
            }
            for name, seeds in curves.items()
        },
        "seconds_an_arm": round(float(np.median([result["seconds"] for result in results])), 1),
        "settings": settings,
    }


def draw_curves(summary: dict[str, Any], file: Path):
    """Save the curves of the arms, a panel a comparison."""
    images, settings, arms = np.array(summary["images"]) / 1000, summary["settings"], summary["arms"]
    panels = {title: labels for title, labels in PANELS.items() if labels.keys() & arms.keys()}
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, labels) in zip(axes[0], panels.items(), strict=True):
        for name in [name for name in labels if name in arms]:
            fid, color = arms[name]["fid"], f"C{list(ARMS).index(name)}"
            axis.plot(images, fid["mean"], color=color, marker="o", markersize=4, label=labels[name])
            if fid["low"] is not None:
                axis.fill_between(images, fid["low"], fid["high"], color=color, alpha=0.15, linewidth=0)
        if "default" in arms:
            last = arms["default"]["fid"]["mean"][-1]
            axis.axhline(last, color="C0", linestyle="--", linewidth=1, label="default at its end")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set(title=title, xlabel="images seen after the switch, thousands")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_ylabel(f"FID ({summary['fid']['features']})")
    seeds = max(len(arm["fid_of_seeds"]) for arm in arms.values())
    switch = f"{settings['from_resolution']} → {settings['config']['transform']['resolution']} pixels"
    figure.suptitle(f"{switch}; lines: mean of {seeds} seeds, bands: {summary['interval']}")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def reproduce_switch(options: argparse.Namespace, further: list[str]):
    """Train the arms that are not there, then draw all that are.

    Args:
        options: `output`, `seeds`, `arms`, `from_resolution` (pixels) and `from_steps` of the low-resolution stage.
        further: `--section.key value` arguments of the high-resolution stage.
    """
    setting = [f"--{key}={value}" for key, value in SETTING.items()]
    config = parse_config_or_exit(RunConfig, [*setting, *further], QUICKSTART)
    transfers = Transfers(config, options.from_resolution, options.from_steps, options.output)
    for seed in options.seeds:
        for name in options.arms:
            transfers.curve(name, seed)
    summary = summarize(list((options.output / "arms").glob("*.json")))
    write_json(options.output / "transfer.json", summary)
    draw_curves(summary, options.output / "transfer.png")
