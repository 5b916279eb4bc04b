"""The image files of the demo: saving, limiting their total size, and removing them."""

import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from improved_ldm.picture_text import save_png

MAX_BYTES = 2**30  # total size of the images of all visitors


class PictureFolder:
    """PNG files in their own temporary folder, which is removed when the process ends.

    File names cannot be guessed, and visitors never share a file, even for equal images.

    Args:
        max_bytes: Maximum total size of the files in bytes. If it is exceeded, the oldest are removed.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._folder = TemporaryDirectory(prefix="improved_ldm_demo_")
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}  # bytes of each file, in the order of writing
        self._kept: set[str] = set()
        self._lock = threading.Lock()  # several threads save and remove files

    @property
    def path(self) -> Path:
        """The folder of the files."""
        return Path(self._folder.name).resolve()

    def __contains__(self, file: str) -> bool:
        return file in self._sizes or file in self._kept

    def keep(self, name: str, image: Image.Image, text: dict[str, str]) -> str:
        """Write an image that only `clear` removes, under a name that visitors see, and return its path."""
        file = self.path / f"{name}.png"
        save_png(image, file, text)
        self._kept.add(str(file))
        return str(file)

    def save(self, image: Image.Image, text: dict[str, str]) -> str:
        """Write an image with the text of `picture_text` and return its path."""
        file = self.path / f"{secrets.token_urlsafe(16)}.png"
        save_png(image, file, text)
        with self._lock:
            self._sizes[str(file)] = file.stat().st_size
            while sum(self._sizes.values()) > self._max_bytes and len(self._sizes) > 1:
                self._remove(next(iter(self._sizes)))
        return str(file)

    def remove(self, files: Iterable[str]):
        """Remove files that are not kept; those that are already removed are skipped."""
        with self._lock:
            for file in files:
                self._remove(file)

    def clear(self):
        """Remove all files."""
        self.remove(list(self._sizes))
        while self._kept:
            Path(self._kept.pop()).unlink(missing_ok=True)

    def _remove(self, file: str):
        if self._sizes.pop(file, None) is not None:
            Path(file).unlink(missing_ok=True)
