"""Open what an evaluation compares its samples with, and check that it is what was asked for."""

import json

from improved_ldm.evaluation.features import FeatureNetwork
from improved_ldm.evaluation.reference import Reference, check_reference, open_reference
from improved_ldm.evaluation.reference_npz import (
    BatchImages,
    ReferenceStatistics,
    open_batch_images,
    open_statistics,
)
from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.naming import naming_keys
from improved_ldm.pipeline import ImprovedLDMPipeline


def read_statistics(config: EvaluateConfig, network: FeatureNetwork) -> ReferenceStatistics | None:
    """Read `reference_statistics`, if they are given.

    Raises:
        ValueError: If they are not of the features of the network, or differ from those of earlier results.
    """
    if config.reference_statistics is None:
        return None
    statistics = open_statistics(config.reference_statistics)
    statistics.check(network)
    check_reference(statistics, _expected_hashes(config, "reference_statistics"))
    return statistics


def read_reference(
    config: EvaluateConfig, pipeline: ImprovedLDMPipeline | None, size: tuple[int, int]
) -> Reference | BatchImages | None:
    """Open the reference images at a size (height, width) in pixels; None if there are statistics only.

    Their hash is compared with `reference_hash` and with the hash of earlier results in the output folder.

    Raises:
        ValueError: If the hash or the size differs, or captions or labels that the pipeline needs are missing.
    """
    reference = _open_images(config, pipeline, size)
    expected = {} if config.reference_hash is None else {"`reference_hash`": config.reference_hash}
    if not config.only_writes_statistics:
        expected |= _expected_hashes(config, "reference")
    if reference is not None:
        check_reference(reference, expected)
    elif expected:
        raise ValueError(f"{next(iter(expected))} is for a set of images, but there are only the statistics of a set.")
    return reference


def _open_images(
    config: EvaluateConfig, pipeline: ImprovedLDMPipeline | None, size: tuple[int, int]
) -> Reference | BatchImages | None:
    if config.data is None:
        images = open_batch_images(config.reference_statistics)
        if images is not None and images.shape[1:3] != size:
            there, ours = (f"{height} x {width}" for height, width in (images.shape[1:3], size))
            raise ValueError(
                f"`reference_statistics` is {config.reference_statistics}; its images have {there} pixels, but the "
                f"samples {ours}."
            )
        return images
    takes_text = pipeline is not None and pipeline.takes_text
    reads_labels = pipeline is not None and not takes_text and config.labels == "drawn"
    with naming_keys(source="data"):
        return open_reference(
            config.data,
            config.split,
            size,
            config.num_reference_images,
            config.batch_size,
            name=config.name,
            image_column=config.image_column,
            caption_column=config.caption_column if takes_text else None,
            label_column=config.label_column if reads_labels else None,
        )


def _expected_hashes(config: EvaluateConfig, what: str) -> dict[str, str]:
    """The hashes of a reference in the results of the output folder, by the file that states them.

    Args:
        config: The configuration.
        what: `reference` or `reference_statistics`.
    """
    expected = {}
    for file in (config.folder / "metrics.json", config.folder / "sweep.json"):
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            if "reference" not in record:
                raise ValueError(
                    f"`output_dir` is {config.folder}; its {file.name} is not from an evaluation and would be "
                    "overwritten. Choose another folder."
                )
            if record.get(what):
                expected[str(file)] = record[what]["sha256"]
    return expected
