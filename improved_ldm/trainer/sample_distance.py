"""The distance of a few samples to held-out images during training, by the code of `training/evaluate.py`."""

import shutil
from pathlib import Path
from typing import Any

from improved_ldm.data.spread import spread_if_possible
from improved_ldm.evaluation.evaluate import Evaluation, ScoreSettings, identity
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.meaning import score_notes
from improved_ldm.evaluation.reference import Reference, reference_of_rows
from improved_ldm.evaluation.sampling import Sampler, SamplingSettings, make_requests, open_samples
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.naming import naming_keys
from improved_ldm.pipeline import ImprovedLDMPipeline, NonFiniteLatentsError
from improved_ldm.resolution import sides_of
from improved_ldm.trainer.adapters import set_trained
from improved_ldm.trainer.held_out_data import HeldOut
from improved_ldm.trainer.processes import on_any_process, on_main_process
from improved_ldm.trainer.run import Run

BATCH_SIZE = 50  # largest number of images per call of the pipeline and of the network
DISTANCES = ("fid", "kid")
SAMPLES = "validation-samples"  # folder in that of the run, while they are measured


class SampleDistance:
    """Samples the captions or classes of held-out images, and measures the distance to these images.

    Args:
        run: configuration, folder and processes.
        held_out: the held-out set.
        pipeline: pipeline to sample with, at its own size, guidance and steps.

    Raises:
        ValueError: if there are too few held-out images.
    """

    def __init__(self, run: Run, held_out: HeldOut, pipeline: ImprovedLDMPipeline):
        config = run.config.validation
        self.run, self.pipeline = run, pipeline
        self.batch_size = min(BATCH_SIZE, run.config.training.batch_size)
        self.network = open_features(config.features, run.accelerator.device)
        reference = self._reference(held_out, sides_of(run.config.transform.resolution))
        with naming_keys(nearest_k="validation.num_samples"):
            ScoreSettings().check_reference(reference.images)
        semantics = reference.captions or reference.labels
        self.requests = make_requests(semantics, config.num_samples, run.config.seed, control={})
        defaults = pipeline.config
        self.settings = SamplingSettings(defaults.default_num_inference_steps, defaults.default_guidance_scale)
        self.evaluation = Evaluation(reference, self.network, None, ScoreSettings(), self.batch_size)
        run.say(
            f"every {config.samples_every} steps {config.num_samples} samples are compared with {reference.images} "
            f"held-out images in the features of {identity(self.network)['name']}; so few are for the trend only"
        )

    def _reference(self, held_out: HeldOut, size: tuple[int, int]) -> Reference:
        count, (rows,) = self.run.config.validation.num_samples, held_out.mixture.rows
        place, split = held_out.config.source, held_out.config.split
        return reference_of_rows(spread_if_possible(rows, count), place, split, size, count, self.batch_size)

    def measure(self, averaged: Denoiser, step: int) -> dict[str, Any]:
        """The distances of samples of a model; empty except on the main process, and if sampling fails.

        Args:
            averaged: the model with the averaged weights.
            step: the step, for messages.
        """
        folder = self.run.folder / SAMPLES
        self._remove(folder)  # left by a run that was killed
        set_trained(self.pipeline, averaged)
        try:
            Sampler(self.pipeline, self.requests, self.batch_size).sample(folder, self.settings)
            failed = ""
        except NonFiniteLatentsError as error:
            failed = str(error)
        if on_any_process(self.run.accelerator, bool(failed)):  # and all of them have sampled
            self.run.say(f"step {step}: sampling failed, training continues. {failed}")
            scores = None
        else:
            scores = self.evaluation.scores(open_samples(folder, len(self.requests)))
        self._remove(folder)
        return {} if scores is None else self._record(scores, step)

    @staticmethod
    def _remove(folder: Path):
        on_main_process(lambda: shutil.rmtree(folder, ignore_errors=True))

    def _record(self, scores: dict[str, float], step: int) -> dict[str, Any]:
        """The distances with all that they depend on besides the weights, and why they are not meaningful."""
        distances, features = {name: scores[name] for name in DISTANCES}, identity(self.network)["name"]
        images, real = len(self.requests), self.evaluation.reference.images
        record = {"scores": distances, "samples": {"images": images}, **self.evaluation.record()}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in distances.items())
        self.run.say(f"step {step}: {shown} ({images} samples, {real} held-out images, features of {features})")
        about = {"samples": images, "reference_images": real, "features": features}
        return {**about, **distances, "notes": score_notes(record)}
