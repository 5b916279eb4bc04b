"""Loading of a pipeline of this package; anything else is refused before weights are read."""

from pathlib import Path

from improved_ldm.pipeline import ImprovedLDMPipeline


def open_pipeline(source: str, **options) -> ImprovedLDMPipeline:
    """Load the pipeline of a folder or a Hub id.

    Args:
        source: Folder or Hub id.
        options: Further arguments of `from_pretrained`.

    Raises:
        OSError: If there is no pipeline.
        ValueError: If the pipeline has another class.
    """
    if Path(source).is_dir() and not (Path(source) / ImprovedLDMPipeline.config_name).is_file():
        raise FileNotFoundError(f"the folder holds no pipeline, {ImprovedLDMPipeline.config_name} is missing.")
    name = ImprovedLDMPipeline.load_config(source).get("_class_name")
    if name != ImprovedLDMPipeline.__name__:
        raise ValueError(f"it is a {name}; it must be an {ImprovedLDMPipeline.__name__}.")
    return ImprovedLDMPipeline.from_pretrained(source, **options)
