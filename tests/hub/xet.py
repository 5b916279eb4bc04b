"""The part of the xet protocol that the Hub's double needs: the client uploads into folders that are read back."""

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hf_xet

RECORD = 48  # bytes
BOOKEND = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 0x80000000, 0x40000000


class XetFolders:
    """Content-addressed folders, one per write token, because the client keeps the index of its folder locked.

    Args:
        root: Parent of the folders.
    """

    def __init__(self, root: Path):
        self.root = root

    def new_address(self) -> str:
        """The address of a new folder that a client can upload to."""
        return f"local://{tempfile.mkdtemp(dir=self.root, prefix='cas-')}"

    def read(self, sha256: str, size: int) -> bytes | None:
        """The content of a file, or None if it was not uploaded."""
        for shard in self.root.glob("cas-*/xet/xorbs/shards/*.mdb"):
            for xet_hash, known in _files_of_shard(shard.read_bytes()):
                if known == sha256:
                    return self._read_from(shard.parents[3], xet_hash, size)
        return None

    def _read_from(self, folder: Path, xet_hash: str, size: int) -> bytes:
        with tempfile.TemporaryDirectory(dir=self.root) as temporary:
            copy, file = Path(temporary, "copy"), Path(temporary, "file")
            shutil.copytree(folder, copy)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as downloads:
                downloads.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(file))
            return file.read_bytes()


def _files_of_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """The xet hash and the SHA-256 of every file in a shard, stored in records of 48 bytes after a header."""
    position = RECORD
    while position + RECORD <= len(shard) and shard[position : position + 32] != BOOKEND:
        xet_hash = shard[position : position + 32]
        flags, segments = struct.unpack("<II", shard[position + 32 : position + 40])
        position += RECORD * (1 + segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            yield _hexadecimal(xet_hash), _hexadecimal(shard[position : position + 32])
            position += RECORD


def _hexadecimal(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
