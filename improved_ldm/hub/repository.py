"""A model repository on the Hub: commits, tags and branches. Requests are repeated while the Hub is busy."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from improved_ldm.hub.content import Content
from improved_ldm.places import check_repository_name

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses of temporary errors
PAUSES = (1, 2, 4, 8, 16)  # seconds, if the Hub does not state how long to wait
SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN to a token with write access."
ATTRIBUTES = ".gitattributes"  # the Hub's own file


class HubError(RuntimeError):
    """The Hub refuses a request or cannot be reached. The message states what to do."""


def access_token() -> str:
    """The access token in use.

    Raises:
        HubError: If there is no token.
    """
    token = get_token()
    if token is None:
        raise HubError(f"there is no access token: {SIGN_IN}")
    return token


class Repository:
    """A model repository, created if it does not exist.

    The client itself repeats the upload of a file. All other calls are repeated here. Each first checks whether its
    work is already done, so nothing is done twice after a lost response or a killed process.

    Args:
        name: Name of the repository, `user/name`.
        private: Whether it must be private.

    Raises:
        ValueError: If the name is not valid, or the repository is public but must be private.
        HubError: If the Hub refuses.
    """

    def __init__(self, name: str, private: bool = False):
        check_repository_name(name)
        self.name, self.api = name, HfApi(token=access_token())
        self._ask(self.api.create_repo, name, private=private or None, exist_ok=True)
        if private and not self._ask(self.api.repo_info, name).private:
            raise ValueError(f"`private` is true, but {name} is public: make it private in its settings.")

    def tags(self) -> dict[str, str]:
        """The commits that the tags point to, by name of the tag."""
        return self._ask(self._tags)

    def add_tag(self, tag: str, commit: str):
        """Point a new tag to a commit."""

        def add():
            if self._tags().get(tag) != commit:
                self.api.create_tag(self.name, tag=tag, revision=commit)

        self._ask(add)

    def add_branch(self, branch: str):
        """Create a branch at the newest commit if there is no branch of this name."""
        self._ask(self.api.create_branch, self.name, branch=branch, exist_ok=True)

    def foreign(
        self, content: Content, is_own: Callable[[str], bool], branch: str = constants.DEFAULT_REVISION
    ) -> list[str]:
        """The files of a branch that a commit would replace or remove and that are not our own.

        Args:
            content: Files of the commit.
            is_own: Whether the title of a commit is one of ours. Files of our newest commit are our own.
            branch: Branch of the commit. A branch that does not exist has no files.
        """
        return self._ask(self._foreign, _additions(content), is_own, branch)

    def holds(self, revision: str, content: Content, only: bool = True) -> bool:
        """Whether a revision contains these files, by size and hash; with `only`, no others."""
        return self._ask(self._holds, revision, _additions(content), only)

    def commit(self, content: Content, title: str, branch: str = constants.DEFAULT_REVISION) -> str:
        """Commit these files to a branch and remove all others. The names of removed files are logged.

        If the newest commit or a commit with the same title already contains exactly these files, it is used.

        Args:
            content: Files of the commit.
            title: Title of the commit.
            branch: Branch of the commit.

        Returns:
            Id of the commit.
        """
        additions = _additions(content)  # outside of the repeated call, so that each file is read and uploaded once

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

    def _foreign(self, additions: list[CommitOperationAdd], is_own: Callable[[str], bool], branch: str) -> list[str]:
        if branch not in {known.name for known in self.api.list_repo_refs(self.name).branches}:
            return []
        commits = self.api.list_repo_commits(self.name, revision=branch)
        ours = next((commit.commit_id for commit in commits if is_own(commit.title)), None)
        known = {} if ours is None else {path: file.blob_id for path, file in self._files(ours).items()}
        kept = {addition.path_in_repo: addition for addition in additions}
        return sorted(
            path
            for path, file in self._files(commits[0].commit_id).items()
            if known.get(path) != file.blob_id and not (path in kept and _is_same(kept[path], file))
        )

    def _holds(self, revision: str, additions: list[CommitOperationAdd], only: bool = True) -> bool:
        files, names = self._files(revision), {addition.path_in_repo for addition in additions}
        return (files.keys() == names if only else files.keys() >= names) and all(
            _is_same(addition, files[addition.path_in_repo]) for addition in additions
        )

    def _ask(self, call: Callable[..., Answer], *arguments, **options) -> Answer:
        """Call the Hub. If it is busy or does not respond, wait and call again."""
        pauses = iter(PAUSES)
        while True:
            try:
                return call(*arguments, **options)
            except HTTPError as error:  # an error response, or no response
                pause = next(pauses, None)
                if pause is None or not _passes(error):
                    raise HubError(self._advice(error)) from error
                pause = max(pause, _retry_after(error))
                logger.warning("the Hub is busy (%s); trying again in %d s", _status(error), pause)
                time.sleep(pause)
            except RuntimeError as error:  # the upload of a file failed after the client's own retries
                raise HubError(f"{error} Run the same command again to resume.") from error
            except ConnectionError as error:
                raise HubError(f"the Hub cannot be reached: {error}") from error

    def _advice(self, error: HTTPError) -> str:
        """One line that tells the user how to fix an error."""
        match _status(error):
            case 401:
                return f"the Hub does not accept the access token: {SIGN_IN}"
            case 403:
                return f"the access token cannot write to {self.name}: choose another `repo` or another token."
            case 412:
                return f"someone else has committed to {self.name} in the meantime; run the same command again."
            case status if _passes(error):
                return (
                    f"the Hub at {constants.ENDPOINT} is unavailable ({status}); run the same command later to resume."
                )
            case status:
                return f"the Hub refuses ({status}): {error.server_message}"


def _status(error: HTTPError) -> int | str:
    """The status of a response, or the error if there was no response."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else str(error)


def _passes(error: HTTPError) -> bool:
    """Whether the same call can succeed later."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in BUSY


def _retry_after(error: HTTPError) -> int:
    """Seconds that a busy Hub asks clients to wait."""
    seconds = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return int(seconds) if seconds.isdigit() else 0


def _additions(content: Content) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, source) for path, source in content.items()]


def _is_same(addition: CommitOperationAdd, file: RepoFile) -> bool:
    """Whether a file on the Hub has the content of a local file, by size and hash."""
    if file.size != addition.upload_info.size:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as local:
        return file.blob_id == git_hash(local.read())
