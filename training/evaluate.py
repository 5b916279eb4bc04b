"""Evaluate a trained pipeline, or a folder of images, against real images.

Usage: accelerate launch training/evaluate.py --pipeline FOLDER_OR_ID --data SET [--key value …]

`--samples FOLDER` instead of `--pipeline` scores existing images. `--sweep "guidance_scale=1:8:0.5
control_guidance_scale=0:2:0.5"` samples and scores every combination. `--like adm --reference_statistics FILE.npz`
evaluates as the papers on ImageNet do. `--data SET --resolution 256 --write_statistics FILE.npz` alone writes such a
file. The same command resumes where it was stopped, and several processes give the same numbers as one.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.comparability import adm_comparison
from improved_ldm.evaluation.disentanglement import control_distances
from improved_ldm.evaluation.evaluate import KID_SUBSET_SIZE, Evaluation, identity
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.meaning import judged_notes, score_notes
from improved_ldm.evaluation.obedience import RealImages, evaluate_obedience, open_judged
from improved_ldm.evaluation.perceptual import PerceptualDistance, open_perceptual
from improved_ldm.evaluation.reference import Reference
from improved_ldm.evaluation.reference_npz import BatchImages, write_statistics
from improved_ldm.evaluation.request import (
    EvaluateConfig,
    check_keys,
    check_semantics,
    complete,
    load_pipeline,
    make_all_requests,
    sampling_settings,
)
from improved_ldm.evaluation.request_reference import read_reference, read_statistics
from improved_ldm.evaluation.sampling import Sampler, SamplingSettings, open_samples
from improved_ldm.evaluation.sweep import parse_sweep, point_name, write_sweep
from improved_ldm.exits import exit_on_error
from improved_ldm.hub.card import EVALUATION_FILE, update_card
from improved_ldm.naming import naming_keys
from improved_ldm.places import shareable_place
from improved_ldm.provenance import device_name, launch_command, library_versions, write_json
from improved_ldm.resolution import sides_of
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.run import EVALUATION_TIME, share_cores

MEASURING_LIBRARIES = ("torchmetrics", "torch-fidelity", "open_clip_torch", "improved_ldm")


def main(config: EvaluateConfig):
    accelerator = open_accelerator(trains=False, kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_TIME)])
    share_cores(accelerator, config.cpu_threads)

    # What is evaluated: a pipeline at one or more settings, or existing images.
    check_keys(config)
    if config.only_writes_statistics:
        write_reference(config, accelerator)
        return
    config = complete(config)
    pipeline = None if config.pipeline is None else load_pipeline(config).to(accelerator.device)
    samples = None if config.samples is None else open_samples(config.samples)
    size = samples.size if pipeline is None else pipeline.default_size
    points = parse_sweep(config.sweep) if config.sweep else [{}]
    settings = [None if pipeline is None else sampling_settings(pipeline, config, point) for point in points]
    check_semantics(config, pipeline, samples)

    # What it is measured with: the networks, and the real images.
    network = open_features(config.features, accelerator.device, config.resizing)
    network.check_size("features", size)
    count = len(samples.files) if samples else config.num_samples
    config.scores.check_samples(count, network)
    statistics = read_statistics(config, network)
    clip = None if config.clip is None else open_clip_scorer(config.clip, accelerator.device)
    cmmd = None if config.cmmd is None else open_clip_scorer(config.cmmd, accelerator.device)
    judge = None if pipeline is None or config.sweep else config.obedience.judge
    with naming_keys(judge="obedience.judge", source="data"):
        judged = open_judged(judge, config.data, size, accelerator.print)
    perceptual = None if judged is None else open_perceptual(config.perceptual, accelerator.device)
    if perceptual is not None:
        perceptual.check_size("perceptual", size)
    reference = read_reference(config, pipeline, size)
    check_images(config, reference, accelerator.print)
    scores = config.scores.fitted(count if reference is None else min(reference.images, count))
    if reference is not None and scores != config.scores and scores.kid_subset_size < KID_SUBSET_SIZE:
        accelerator.print(f"kid uses subsets of {scores.kid_subset_size} images, as many as the smaller set has")
    if scores.adm and not network.num_spatial_features:
        accelerator.print(f"sfid is left out: {config.features} has no spatial features")
    elif scores.adm and statistics is not None and "sfid" not in statistics.gaussians:
        accelerator.print(f"sfid is left out: {config.reference_statistics} has no `mu_s` and `sigma_s`")

    # What the pipeline samples, and the folders for it.
    folders = [config.folder / "sweep" / point_name(point) if point else config.folder for point in points]
    sampler = None
    if pipeline is not None:
        sampler = Sampler(pipeline, make_all_requests(config, pipeline, reference), config.batch_size)
        for folder, setting in zip(folders, settings, strict=True):
            sampler.check_folder(folder / "samples", setting)
    evaluation = Evaluation(reference, network, clip, scores, config.batch_size, statistics, cmmd)
    if config.write_statistics is not None and accelerator.is_main_process:
        save_statistics(config, evaluation)
    accelerator.print(f"results are written to {config.folder}/")

    # Samples, then numbers, setting by setting.
    records = []
    for folder, setting in zip(folders, settings, strict=True):
        started = time.perf_counter()
        if sampler is not None:
            sampler.sample(folder / "samples", setting)
            accelerator.wait_for_everyone()
            samples = open_samples(folder / "samples", config.num_samples)
        sampled = time.perf_counter()
        scores = evaluation.scores(samples)
        if not accelerator.is_main_process:
            continue
        record = {
            "scores": scores,
            "samples": {"images": len(samples.files)} | describe_samples(config, sampler, setting),
            **evaluation.record(),
            "libraries": library_versions(*MEASURING_LIBRARIES),
            "device": device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "command": launch_command(),
            "seconds": {
                "sampling": round(sampled - started, 1),
                "scoring": round(time.perf_counter() - sampled, 1),
            },
        }
        record["comparison"] = adm_comparison(record)
        if judged is not None:
            record |= judge_control(config, pipeline, setting, judged, perceptual)
        record["notes"] = score_notes(record) | judged_notes(
            record.get("obedience", {}) | record.get("disentanglement", {})
        )
        for name, note in record["notes"].items():
            accelerator.print(f"{name} is not meaningful: {note}")
        write_json(folder / "metrics.json", record)
        records.append(record)
    if accelerator.is_main_process:
        write_results(config, records)
    accelerator.end_training()


def check_images(config: EvaluateConfig, reference: Reference | BatchImages | None, say: Callable[[str], None]):
    """Say what the reference images are, or which scores their absence leaves out.

    Raises:
        ValueError: If there are too few images for the scores, or none for a score that was asked for.
    """
    if reference is not None:
        say(reference.description)
        config.scores.check_reference(reference.images)
        return
    if config.cmmd is not None:
        raise ValueError(
            f"`cmmd` is {config.cmmd}; it needs images, but {config.reference_statistics} has statistics only."
        )
    left_out = [
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        *["adm_precision", "adm_recall"] * config.scores.adm,
    ]
    say(f"{', '.join(left_out)} are left out: {config.reference_statistics} has statistics only, no images")


def judge_control(
    config: EvaluateConfig,
    pipeline: ImprovedLDMPipeline,
    setting: SamplingSettings,
    judged: tuple[Judge, RealImages],
    perceptual: PerceptualDistance,
) -> dict[str, Any]:
    """How well the pipeline obeys class and control, and what else changes when the control does."""
    print("judging samples")
    counts, call = config.obedience.counts, asdict(setting)
    detail = counts["num_detail_samples"]
    return {
        "obedience": evaluate_obedience(pipeline, *judged, **counts, seed=config.seed, **call),
        "disentanglement": control_distances(pipeline, perceptual, judged[1], detail, config.seed, **call),
        "judged_samples": call | {"seed": config.seed, "control": "set by each test; that of `samples` is not used"},
        "judge": shareable_place(config.obedience.judge),
        "perceptual": identity(perceptual),
    }


def write_reference(config: EvaluateConfig, accelerator: Accelerator):
    """Write the statistics of the reference images; nothing is sampled or scored."""
    size = sides_of(config.resolution)
    network = open_features(config.features, accelerator.device, config.resizing)
    network.check_size("features", size)
    reference = read_reference(config, None, size)
    accelerator.print(reference.rows.description)
    config.scores.check_reference(reference.images)
    evaluation = Evaluation(reference, network, None, config.scores, config.batch_size)
    if accelerator.is_main_process:
        save_statistics(config, evaluation)
    accelerator.end_training()


def save_statistics(config: EvaluateConfig, evaluation: Evaluation):
    """Write the statistics of an evaluation's reference images and say where they are."""
    reference = evaluation.reference.record()
    write_statistics(config.write_statistics, evaluation.gaussians, evaluation.network, reference)
    print(f"{config.write_statistics} holds the statistics of {reference['images']} reference images")


def describe_samples(
    config: EvaluateConfig, sampler: Sampler | None, setting: SamplingSettings | None
) -> dict[str, Any]:
    """The requests and settings of the samples, or the folder of existing images."""
    if sampler is None:
        return {"folder": shareable_place(str(config.samples))}
    requests = sampler.requests
    return {
        "pipeline": shareable_place(config.pipeline),
        "labels": "captions in turn" if isinstance(requests[0].semantic, str) else config.labels,
        "seeds": [requests[0].seed, requests[-1].seed],
        "control": config.control,
        "batch_size": config.batch_size,
        **sampler.record(setting),
    }


def write_results(config: EvaluateConfig, records: list[dict[str, Any]]):
    """Write the results of a sweep, or show the numbers of a single evaluation on the card."""
    if config.sweep:
        write_sweep(records, config.folder)
        print(f"{config.folder}/ holds sweep.json and sweep.png, and under sweep/ the samples of each point")
        return
    print(json.dumps(records[0]["scores"], indent=2))
    print(records[0]["comparison"])
    print(f"{config.folder}/ holds metrics.json")
    if config.update_card and config.pipeline and Path(config.pipeline).is_dir():
        write_json(Path(config.pipeline) / EVALUATION_FILE, records[0])
        if update_card(Path(config.pipeline)):
            print(f"{config.pipeline}/README.md shows the numbers")


if __name__ == "__main__":
    with exit_on_error("not evaluated", "batch_size"):
        main(parse_config_or_exit(EvaluateConfig, sys.argv[1:]))
