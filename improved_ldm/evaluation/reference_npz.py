"""Reference statistics and reference images in the `.npz` files of ADM's evaluation suite."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from improved_ldm.evaluation.features import FeatureNetwork
from improved_ldm.evaluation.gaussian import Gaussian
from improved_ldm.evaluation.processes import own_batches
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_whole

IMAGES = "arr_0"  # the suite's name of the array of images
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # the score → the suite's names of its arrays
ABOUT = "improved_ldm"  # our own array: a JSON text that states what the statistics were measured with
NEGLIGIBLE = 1e-4  # rounding of a covariance, relative to its largest eigenvalue
STATED = ("features", "resizing", "images", "reference")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance of the features of a reference set.

    Args:
        source: The file.
        sha256: Hash of the means and covariances.
        gaussians: The Gaussians of the pooled features (`fid`) and, if the file has them, of the spatial features
            (`sfid`), by the score that they are for.
        about: What they were measured with, if the file states it: `features`, `resizing`, `images`, `reference`.
    """

    source: str
    sha256: str
    gaussians: dict[str, Gaussian]
    about: dict[str, Any]

    def check(self, network: FeatureNetwork):
        """Raise a ValueError if the statistics are not of the features of a network."""
        sizes = {"fid": network.num_features, "sfid": network.num_spatial_features}
        for name, gaussian in self.gaussians.items():
            if sizes[name] not in (0, len(gaussian.mean)):
                raise ValueError(
                    f"`reference_statistics` is {self.source}; its `{KEYS[name][0]}` has {len(gaussian.mean)} "
                    f"features, but {network.name} has {sizes[name]}."
                )
        ours = {"features": network.sha256, "resizing": network.resizing}
        for name, value in ours.items():
            if self.about.get(name, value) != value:
                raise ValueError(
                    f"`reference_statistics` is {self.source}; it was measured with `{name}` {self.about[name]}, not "
                    f"{value}."
                )

    def record(self) -> dict[str, Any]:
        """Everything that identifies the statistics, for the record of an evaluation."""
        return {"source": shareable_place(self.source), "sha256": self.sha256, "images": None} | self.about


@dataclass(frozen=True)
class BatchImages:
    """The images of a batch file, which are read again each time.

    Args:
        source: The file.
        shape: (images, height, width, 3).
        sha256: Hash of the bytes of the images.
    """

    source: str
    shape: tuple[int, int, int, int]
    sha256: str
    captions = None
    labels = None

    @property
    def images(self) -> int:
        """Number of images."""
        return self.shape[0]

    @property
    def description(self) -> str:
        """What is read, in one line."""
        return f"{self.images} images of {self.source}"

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The batches (batch, 3, height, width) in [-1, 1] of this process, as assigned by `own_batches`."""
        own = {numbers.start for numbers in own_batches(self.images, batch_size)}
        for number, images in enumerate(_read_images(self.source, batch_size)):
            if number * batch_size in own:
                yield torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1

    def record(self) -> dict[str, Any]:
        """Everything that identifies the images, for the record of an evaluation."""
        return {
            "source": shareable_place(self.source),
            "split": IMAGES,
            "images": self.images,
            "sha256": self.sha256,
            "resolution": list(self.shape[1:3]),
        }


def open_statistics(file: Path) -> ReferenceStatistics:
    """Read reference statistics.

    Args:
        file: An `.npz` with `mu` (dim,) and `sigma` (dim, dim), and perhaps `mu_s` and `sigma_s`, the same of spatial
            features. Files with pickled objects are refused.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, or an array is missing, of another shape, not finite or not symmetric.
    """
    if not file.is_file():
        raise FileNotFoundError(f"`reference_statistics` is {file}; there is no such file.")
    with _reading(file), _arrays(file) as arrays:
        found = {name: keys for name, keys in KEYS.items() if set(keys) <= set(arrays)}
        if "fid" not in found:
            raise ValueError(f"it has the arrays {', '.join(arrays) or 'none'}; `mu` and `sigma` are needed")
        values = {key: arrays[key] for keys in found.values() for key in keys}
        about = _stated(str(arrays[ABOUT])) if ABOUT in arrays else {}
        gaussians = {name: _gaussian(*keys, values) for name, keys in found.items()}
    digest = hashlib.sha256()
    for key, array in values.items():
        digest.update(f"{key} {array.shape}\n".encode() + array.astype(np.float64).tobytes())
    return ReferenceStatistics(str(file), digest.hexdigest(), gaussians, about)


def write_statistics(file: Path, gaussians: dict[str, Gaussian], network: FeatureNetwork, reference: dict[str, Any]):
    """Write reference statistics that `open_statistics` and ADM's evaluation suite read.

    Args:
        file: The `.npz` to write.
        gaussians: The Gaussians by the score that they are for, as in `ReferenceStatistics`.
        network: The network of the features.
        reference: Record of the reference set.
    """
    about = dict(
        zip(STATED, (network.sha256, network.resizing, reference["images"], reference["sha256"]), strict=True)
    )
    arrays = {
        key: array.numpy()
        for name, gaussian in gaussians.items()
        for key, array in zip(KEYS[name], (gaussian.mean, gaussian.covariance), strict=True)
    }
    write_whole(file, partial(_save, arrays=arrays | {ABOUT: np.array(json.dumps(about))}))


def open_batch_images(file: Path) -> BatchImages | None:
    """The images of a batch file; None if it has statistics only.

    Raises:
        ValueError: If they cannot be read or are not (images, height, width, 3) bytes.
    """
    with _reading(file):
        with zipfile.ZipFile(file) as members:
            if f"{IMAGES}.npy" not in members.namelist():
                return None
        digest, count = hashlib.sha256(), 0
        for images in _read_images(str(file), 256):
            digest.update(images.tobytes())
            count += len(images)
        return BatchImages(str(file), (count, *images.shape[1:]), digest.hexdigest())


def _stated(text: str) -> dict[str, Any]:
    """What this library wrote about the statistics."""
    try:
        stated = json.loads(text)
        return {name: stated[name] for name in STATED}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"its array `{ABOUT}` is not one that this library wrote") from None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"`reference_statistics` is {file}; it cannot be used: {reason}.") from error


@contextmanager
def _arrays(file: Path) -> Iterator[np.lib.npyio.NpzFile]:
    arrays = np.load(file, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array; it must be an .npz with `mu` and `sigma`")
    with arrays:
        yield arrays


def _gaussian(mean_key: str, covariance_key: str, values: dict[str, np.ndarray]) -> Gaussian:
    mean, covariance = values[mean_key], values[covariance_key]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise ValueError(
            f"`{mean_key}` is {mean.shape} and `{covariance_key}` {covariance.shape}; they must be (dim,) and "
            "(dim, dim)"
        )
    for key in (mean_key, covariance_key):
        if values[key].dtype.kind != "f" or not np.isfinite(values[key]).all():
            found = f"{values[key].dtype}" if values[key].dtype.kind != "f" else "not finite"
            raise ValueError(f"`{key}` is {found}; it must hold finite floats")
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6):
        raise ValueError(f"`{covariance_key}` is not symmetric")
    spectrum = np.linalg.eigvalsh(covariance.astype(np.float64))
    if spectrum[0] < -NEGLIGIBLE * max(spectrum[-1], 0):
        raise ValueError(f"`{covariance_key}` has the eigenvalue {spectrum[0]:.3g}; a covariance has none below 0")
    return Gaussian(*(torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance)))


def _read_images(file: str, batch_size: int) -> Iterator[np.ndarray]:
    """The images in batches (batch, height, width, 3), of which only one is in memory."""
    with zipfile.ZipFile(file) as members, members.open(f"{IMAGES}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = header(stream)
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or is_fortran or dtype != np.uint8:
            raise ValueError(f"`{IMAGES}` is {shape} {dtype}; it must be (images, height, width, 3) bytes")
        size = shape[1] * shape[2] * 3
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            data = bytearray(stream.read(count * size))
            if len(data) < count * size:
                raise ValueError(f"`{IMAGES}` ends after {start} of {shape[0]} images")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


def _save(path: Path, arrays: dict[str, np.ndarray]):
    with path.open("wb") as file:  # given a path, NumPy would change its name
        np.savez(file, **arrays)
