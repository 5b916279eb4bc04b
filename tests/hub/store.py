"""The repositories of the Hub's double, in memory: commits, branches, tags and file contents."""

import re
import secrets
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime

from huggingface_hub.utils.sha import git_hash

LFS_SUFFIXES = ("arrow", "bin", "gz", "npy", "parquet", "safetensors", "tar", "zip")
LFS_SIZE = 10 * 2**20  # bytes from which every file is stored as a large file


class NotFound(Exception):
    """A revision or file does not exist; `code` is the Hub's error code."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Blob:
    """A file of a commit.

    Args:
        oid: git's SHA-1 of the content or, for a large file, of the pointer to it.
        size: Size of the content in bytes.
        sha256: SHA-256 of the content of a large file.
    """

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit, with all its files by path."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits by id, and the branches and tags that point to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, or the first characters of an id."""
        known = self.branches | self.tags
        commit = known.get(revision.removeprefix("refs/heads/"))
        if commit is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            commit = next((id for id in self.commits if id.startswith(revision)), None)
        if commit is None:
            raise NotFound("RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit]

    def history(self, revision: str) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits


class Store:
    """Repositories by (type, `namespace/name`), and contents by hash."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def create(self, kind: str, name: str, private: bool):
        """Create a repository with one commit."""
        repository = self.repositories[kind, name] = Repository(private)
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit(repository, "main", {".gitattributes": self.add_small(attributes.encode())}, "initial commit")

    def add_small(self, content: bytes) -> Blob:
        """Store a file that is kept in git itself."""
        oid = git_hash(content)
        self.contents[oid] = content
        return Blob(oid, len(content))

    def large(self, sha256: str) -> Blob | None:
        """The pointer to a large file, or None if its content was not uploaded."""
        if sha256 not in self.contents:
            return None
        size = len(self.contents[sha256])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Blob(git_hash(pointer.encode()), size, sha256)

    def commit(
        self,
        repository: Repository,
        branch: str,
        files: dict[str, Blob],
        title: str,
        message: str = "",
        author: str = "system",
    ) -> Commit:
        """Add a commit to a branch."""
        id = secrets.token_hex(20)
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = Commit(id, repository.branches.get(branch), title, message, author, date, files)
        repository.commits[id] = commit
        repository.branches[branch] = id
        return commit


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores a file outside of git, judged by its name, size and first bytes."""
    return path.rsplit(".", 1)[-1] in LFS_SUFFIXES or size >= LFS_SIZE or b"\0" in sample
