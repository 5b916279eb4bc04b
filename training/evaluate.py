"""Evaluate a trained pipeline, or a folder of images, against real images.

Usage: accelerate launch training/evaluate.py --pipeline FOLDER_OR_ID --data SET [--key value …]

`--samples FOLDER` in place of `--pipeline` scores images that are there. `--sweep "guidance_scale=1:8:0.5
control_guidance_scale=0:2:0.5"` draws and scores every combination. The same command goes on where it was stopped, and
several processes give the same numbers as one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.disentanglement import control_distances
from improved_ldm.evaluation.evaluate import Evaluation, identity
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import RealImages
from improved_ldm.evaluation.perceptual import PerceptualDistance, open_perceptual
from improved_ldm.evaluation.sampling import Request, draw_samples, open_samples
from improved_ldm.evaluation.sweep import parse_sweep, point_name, write_sweep
from improved_ldm.hub.card import EVALUATION_FILE, update_card
from improved_ldm.provenance import device_name, launch_command, library_versions, write_json
from improved_ldm.trainer.config import parse_config_or_exit
from improved_ldm.trainer.evaluation import (
    EvaluateConfig,
    check_keys,
    check_prompts,
    load_pipeline,
    make_all_requests,
    read_reference,
    sampling_settings,
)
from improved_ldm.trainer.finish import measure_obedience, open_judged
from improved_ldm.trainer.run import EVALUATION_TIME, share_cores

MEASURING_LIBRARIES = ("torchmetrics", "torch-fidelity", "open_clip_torch", "improved_ldm")


def main(config: EvaluateConfig):
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_TIME)])
    share_cores(accelerator, config.cpu_threads)

    # What is evaluated: a pipeline at one or more settings, or images that are there.
    check_keys(config)
    pipeline = None if config.pipeline is None else load_pipeline(config).to(accelerator.device)
    samples = None if config.samples is None else open_samples(config.samples)
    size = samples.size if pipeline is None else (pipeline.default_size, pipeline.default_size)
    points = parse_sweep(config.sweep) if config.sweep else [{}]
    settings = [None if pipeline is None else sampling_settings(pipeline, config, point) for point in points]
    check_prompts(config, pipeline, samples)

    # What it is measured with: the networks, and the real images.
    network = open_features(config.features, accelerator.device)
    clip = None if config.clip is None else open_clip_scorer(config.clip, accelerator.device)
    judge = None if pipeline is None or config.sweep else config.obedience.judge
    judged = open_judged(judge, config.data, size[0], accelerator.print)
    perceptual = None if judged is None else open_perceptual(config.perceptual, accelerator.device)
    reference = read_reference(config, pipeline, size)
    requests = [] if pipeline is None else make_all_requests(config, pipeline, reference)
    config.scores.check(reference.images, len(samples.files) if samples else len(requests))
    evaluation = Evaluation(reference, network, clip, config.scores, config.batch_size)

    # Samples, then numbers, setting by setting.
    records, sampler = [], {}
    for point, setting in zip(points, settings, strict=True):
        folder, started = config.folder / "sweep" / point_name(point) if point else config.folder, time.perf_counter()
        if pipeline is not None:
            sampler = draw_samples(pipeline, requests, setting, folder / "samples", config.batch_size)
            accelerator.wait_for_everyone()
            samples = open_samples(folder / "samples", len(requests))
        sampled = time.perf_counter()
        scores = evaluation.scores(samples)
        if not accelerator.is_main_process:
            continue
        record = {
            "scores": scores,
            "samples": {"images": len(samples.files)} | describe_samples(config, requests) | sampler,
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
        if judged is not None:
            record |= judge_control(config, pipeline, judged, perceptual)
        write_json(folder / "metrics.json", record)
        records.append(record)
    if accelerator.is_main_process:
        finish(config, records)
    accelerator.end_training()


def judge_control(
    config: EvaluateConfig,
    pipeline: ImprovedLDMPipeline,
    judged: tuple[Judge, RealImages],
    perceptual: PerceptualDistance,
) -> dict[str, Any]:
    """How well the pipeline obeys class and control, and what else changes when the control does."""
    print("judging samples")
    count = config.obedience.num_detail_samples
    return {
        "obedience": measure_obedience(pipeline, judged, config.obedience, config.seed),
        "disentanglement": control_distances(pipeline, perceptual, judged[1], count, config.seed),
        "perceptual": identity(perceptual),
    }


def describe_samples(config: EvaluateConfig, requests: list[Request]) -> dict[str, Any]:
    """What was asked for, or where the images were found."""
    if not requests:
        return {"folder": str(config.samples)}
    return {
        "pipeline": config.pipeline,
        "labels": "captions in turn" if isinstance(requests[0].semantic, str) else config.labels,
        "seeds": [requests[0].seed, requests[-1].seed],
        "control": config.control,
        "batch_size": config.batch_size,
    }


def finish(config: EvaluateConfig, records: list[dict[str, Any]]):
    """Write what the points of a sweep say together, or show the numbers of a single evaluation on the card."""
    if config.sweep:
        write_sweep(records, config.folder)
        print(f"{config.folder}/ holds sweep.json and sweep.png, and under sweep/ the samples of each point")
        return
    print(json.dumps(records[0]["scores"], indent=2))
    print(f"{config.folder}/ holds metrics.json")
    if config.update_card and config.pipeline and Path(config.pipeline).is_dir():
        write_json(Path(config.pipeline) / EVALUATION_FILE, records[0])
        if update_card(Path(config.pipeline)):
            print(f"{config.pipeline}/README.md shows the numbers")


if __name__ == "__main__":
    main(parse_config_or_exit(EvaluateConfig, sys.argv[1:]))
