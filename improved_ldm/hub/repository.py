"""A model repository on the Hub: commits, tags and branches, asked for again while the Hub is busy."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from improved_ldm.hub.content import Content

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that pass
PAUSES = (1, 2, 4, 8, 16)  # seconds, where the Hub does not say how long
SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN to a token that may write."
ATTRIBUTES = ".gitattributes"  # the Hub's own file


class HubError(RuntimeError):
    """The Hub refuses, or cannot be reached; the message says what to do."""


def access_token() -> str:
    """The token in use.

    Raises:
        HubError: if there is none.
    """
    token = get_token()
    if token is None:
        raise HubError(f"there is no access token: {SIGN_IN}")
    return token


def check_repository_name(name: str, argument: str = "repo"):
    """Raise a ValueError that names the argument if what it gives cannot be a repository with an owner."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"`{argument}` is {name!r}; it must be `user/name`: {error}") from error
    if "/" not in name:
        raise ValueError(f"`{argument}` is {name!r}; it must be `user/name`.")


class Repository:
    """A model repository, made where there is none.

    The client repeats the upload of a file by itself. The other calls are repeated here, so each of them first looks
    whether its work is done: an answer that is lost, or a process that is killed, costs nothing twice.

    Args:
        name: `user/name`.
        private: whether it must be private.

    Raises:
        ValueError: if the name is none, or the repository is public and must be private.
        HubError: if the Hub refuses.
    """

    def __init__(self, name: str, private: bool = False):
        check_repository_name(name)
        self.name, self.api = name, HfApi(token=access_token())
        self._ask(self.api.create_repo, name, private=private or None, exist_ok=True)
        if private and not self._ask(self.api.repo_info, name).private:
            raise ValueError(f"`private` is true; {name} is public already: make it private in its settings.")

    def tags(self) -> dict[str, str]:
        """The commits that tags point to, by the tags' names."""
        return self._ask(self._tags)

    def add_tag(self, tag: str, commit: str):
        """Point a new tag to a commit."""

        def add():
            if self._tags().get(tag) != commit:
                self.api.create_tag(self.name, tag=tag, revision=commit)

        self._ask(add)

    def add_branch(self, branch: str):
        """Begin a branch at the newest commit, where there is no branch of that name."""
        self._ask(self.api.create_branch, self.name, branch=branch, exist_ok=True)

    def holds(self, revision: str, content: Content) -> bool:
        """Whether a revision holds these files and no others, by their sizes and hashes."""
        return self._ask(self._holds, revision, _additions(content))

    def commit(self, content: Content, title: str, branch: str = constants.DEFAULT_REVISION) -> str:
        """Make these files, and no others, the newest commit of a branch; the names of those that go are logged.

        A commit of that title, or the newest one, that holds these files already is that commit.

        Args:
            content: the files.
            title: of the commit.
            branch: that it goes to.

        Returns:
            The commit's id.
        """
        additions = _additions(content)  # once, so that a file is read and uploaded once

        def commit() -> str:
            commits = self.api.list_repo_commits(self.name, revision=branch)
            newest = commits[0].commit_id
            for known in commits:
                if (known.title == title or known.commit_id == newest) and self._holds(known.commit_id, additions):
                    return known.commit_id
            stale = self._files(newest).keys() - content.keys()
            if stale:
                logger.warning("%s: the commit removes %s from %s", self.name, ", ".join(sorted(stale)), branch)
            operations = [*additions, *(CommitOperationDelete(path) for path in sorted(stale))]
            return self.api.create_commit(
                self.name, operations, commit_message=title, revision=branch, parent_commit=newest
            ).oid

        return self._ask(commit)

    def _tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.name).tags}

    def _files(self, revision: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(self.name, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.path != ATTRIBUTES}

    def _holds(self, revision: str, additions: list[CommitOperationAdd]) -> bool:
        files = self._files(revision)
        return files.keys() == {addition.path_in_repo for addition in additions} and all(
            _is_same(addition, files[addition.path_in_repo]) for addition in additions
        )

    def _ask(self, call: Callable[..., Answer], *arguments, **options) -> Answer:
        """Call the Hub; where it is busy or silent, wait and call again."""
        pauses = iter(PAUSES)
        while True:
            try:
                return call(*arguments, **options)
            except HTTPError as error:  # an answer of the Hub, or none
                pause = next(pauses, None)
                if pause is None or not _passes(error):
                    raise HubError(self._advice(error)) from error
                pause = max(pause, _retry_after(error))
                logger.warning("the Hub is busy (%s); trying again in %d s", _status(error), pause)
                time.sleep(pause)
            except RuntimeError as error:  # a file whose upload failed after the client's own repetitions
                raise HubError(f"{error} The same command goes on from there.") from error
            except ConnectionError as error:
                raise HubError(f"the Hub cannot be reached: {error}") from error

    def _advice(self, error: HTTPError) -> str:
        """What a user can do about an error, in one line."""
        match _status(error):
            case 401:
                return f"the Hub does not accept the access token: {SIGN_IN}"
            case 403:
                return f"the access token may not write to {self.name}: choose another `repo`, or a token that may."
            case 412:
                return f"somebody else has committed to {self.name} in the meantime; run the same command again."
            case status if _passes(error):
                return f"the Hub at {constants.ENDPOINT} is out of order ({status}); the same command goes on later."
            case status:
                return f"the Hub refuses ({status}): {error.server_message}"


def _status(error: HTTPError) -> int | str:
    """The status of an answer, or what went wrong where there was none."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else str(error)


def _passes(error: HTTPError) -> bool:
    """Whether the same call can succeed later."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in BUSY


def _retry_after(error: HTTPError) -> int:
    """Seconds for which a busy Hub asks to be left alone."""
    seconds = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return int(seconds) if seconds.isdigit() else 0


def _additions(content: Content) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, source) for path, source in content.items()]


def _is_same(addition: CommitOperationAdd, file: RepoFile) -> bool:
    """Whether a file on the Hub has the content of a local one, by the hash under which the Hub keeps it."""
    if file.size != addition.upload_info.size:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as local:
        return file.blob_id == git_hash(local.read())
