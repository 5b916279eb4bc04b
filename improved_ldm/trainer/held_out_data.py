"""Which images of a run are held out: another split of its set, or another set; none that it trains on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from improved_ldm.data.files import local_splits
from improved_ldm.data.mixture import Mixture, Source
from improved_ldm.evaluation.features import open_features
from improved_ldm.naming import DATA_KEYS, naming_keys, naming_part
from improved_ldm.places import is_hub_id, shareable_place
from improved_ldm.resolution import sides_of
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.data import open_data, survey
from improved_ldm.trainer.data_sections import ImageDataConfig, ImageSourceConfig
from improved_ldm.trainer.sections import ValidationConfig
from improved_ldm.trainer.task_config import TaskConfig

SPLITS = ("validation", "test")  # in the order in which they are looked for
NO_SPLIT = f"`data` has no local split {' or '.join(SPLITS)}"


@dataclass(frozen=True)
class HeldOut:
    """The held-out sets of a run.

    Args:
        config: the sets, as keys of `data`.
        mixture: the opened sets, with the class numbers of the training sets.
    """

    config: ImageDataConfig
    mixture: Mixture

    @property
    def places(self) -> str:
        """The sets, without local folders."""
        return ", ".join(map(shareable_place, self.config.places))

    @property
    def described(self) -> str:
        """The sets and their split in words."""
        return f"{self.places}, split {self.config.split!r}"


def open_held_out(config: SharedConfig, training: Mixture) -> HeldOut | None:
    """Open and check the held-out images of a run; None if it measures none, or its set has no held-out split.

    Args:
        config: configuration of the run.
        training: its opened training sets.

    Raises:
        FileNotFoundError, ValueError: if the images do not exist, lack captions or have other classes, if the run
            trains on some of them, or if there are none but `every` or `samples_every` is given.
        MissingWeightsError: if the weights of the feature network of distances are not available.
    """
    validation, takes_text = config.validation, training.caption_column is not None
    if validation.every == 0 and not validation.samples_every:
        return None
    held_out = open_apart(config, training, lambda data, keys: open_data(data, takes_text, keys))
    if held_out is None:
        _check_not_asked_for(config.validation)
    elif validation.samples_every:
        _check_distance(config, held_out.mixture)
    return held_out


def open_apart(
    config: TaskConfig, training: Mixture, open_mixture: Callable[[ImageDataConfig, Mapping[str, str]], Mixture]
) -> HeldOut | None:
    """Open and check the held-out images that a configuration names; None if its set has no held-out split.

    Args:
        config: configuration of the run.
        training: its opened training sets.
        open_mixture: function that opens sets, with the keys of the configuration by the names of arguments.

    Raises:
        FileNotFoundError, ValueError: if the images do not exist, lack captions or have other classes, or the run
            trains on some of them.
    """
    data = _held_out_config(config)
    if data is None:
        return None
    if training.class_names is not None:
        data = data.model_copy(update={"num_classes": None})  # the classes of another set may be fewer
    keys = DATA_KEYS | {"split": "validation.split"}
    if config.validation.source is not None:
        keys |= {"source": "validation.source", "name": "validation.source"}
    mixture = open_mixture(data, keys)
    _check_apart(config.data, training, data, mixture)
    with naming_part("`validation`"):
        mixture = _with_classes_of(training, mixture) if training.rows[0].label_column else mixture
        survey(mixture)
    return HeldOut(data, mixture)


def _held_out_config(config: TaskConfig) -> ImageDataConfig | None:
    """The held-out sets as keys of `data`; None if there is no held-out split."""
    data, source, split = config.data, config.validation.source, config.validation.split
    if source is None:
        split = split or _common_split(data.each_source())
        sources = tuple(one.model_copy(update={"split": split}) for one in data.sources)
        return split and data.model_copy(update={"split": split, "sources": sources})
    if split is None and is_hub_id(source):
        raise ValueError(f"`validation.source` is {source!r}, on the Hub; give its split as `validation.split`.")
    split = split or next((split for split in SPLITS if split in local_splits(source)), "train")
    name = data.name if source == data.source else None
    return data.model_copy(update={"source": source, "sources": (), "split": split, "name": name})


def _check_not_asked_for(validation: ValidationConfig):
    """Raise a ValueError if measurements are asked for that need held-out images."""
    for key in ("every", "samples_every"):
        if value := getattr(validation, key):
            raise ValueError(
                f"`validation.{key}` is {value}, but {NO_SPLIT}; give held-out images as `validation.split` or "
                "`validation.source`."
            )


def _common_split(sources: Sequence[ImageSourceConfig]) -> str | None:
    """The held-out split that all sets have; None if one of them has none, or is on the Hub."""
    if any(is_hub_id(source.source) for source in sources):
        return None
    splits = [{*local_splits(source.source)} - {source.split} for source in sources]
    return next((split for split in SPLITS if all(split in these for these in splits)), None)


def _check_apart(config: ImageDataConfig, training: Mixture, held_out: ImageDataConfig, mixture: Mixture):
    """Raise a ValueError if a run trains on held-out images."""
    remedy = "held-out images must be others. Give another `validation.split` or `validation.source`."
    shared = sorted({*training.files} & {*mixture.files})
    if shared:
        raise ValueError(
            f"`validation` reads {len(shared)} of the {len(training.files)} files that the run trains on, such as "
            f"{shared[0]}; {remedy}"
        )
    trained_on = {(one.source, one.name, one.split) for one in config.each_source() if is_hub_id(one.source)}
    for one in held_out.each_source():
        if (one.source, one.name, one.split) in trained_on:
            raise ValueError(f"`validation` reads {one.source}, split {one.split!r}, as the training does; {remedy}")


def _check_distance(config: SharedConfig, mixture: Mixture):
    """Raise an error if samples cannot be compared with the held-out images."""
    validation = config.validation
    if len(mixture.sources) > 1:
        raise ValueError(
            f"`validation.samples_every` is {validation.samples_every}, but there are several held-out sets; give the "
            "one to compare with as `validation.source`."
        )
    network = open_features(validation.features)
    with naming_keys(features="validation.features"):
        network.check_size("features", sides_of(config.transform.resolution))


def _with_classes_of(training: Mixture, held_out: Mixture) -> Mixture:
    """Held-out sets whose labels mean what they mean in the training sets.

    Raises:
        ValueError: if only one of the two names its classes, or a class is not one of the training's.
    """
    known, names = training.class_names, held_out.class_names
    if known == names:
        return held_out
    if known is None or names is None:
        whose, others = ("held-out", "training") if names is None else ("training", "held-out")
        raise ValueError(f"the {others} images name their classes, but the {whose} ones do not; both must, or none.")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the held-out images have the class {unknown[0]!r}, which the training images do not have.")
    numbers = [known.index(name) for name in names]

    def renumbered(source: Source) -> Source:
        own = tuple(numbers[label] for label in source.rows.own_classes or range(len(names)))
        return replace(source, rows=replace(source.rows, class_names=known, own_classes=own))

    return Mixture(tuple(map(renumbered, held_out.sources)))
