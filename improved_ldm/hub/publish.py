"""Publish trained folders on the Hub: one commit and one tag a version."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from improved_ldm.hub.content import (
    Content,
    Variant,
    addressed,
    check_complete,
    check_options,
    check_shareable,
    folder_content,
    stage_folders,
    trained_as,
    variant_content,
)
from improved_ldm.hub.repository import Repository, access_token, check_repository_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """A version to be published: its name, and what it holds."""

    version: str
    content: Content


def publish(
    folder: Path,
    repo: str,
    version: str,
    variant: Variant | None = None,
    private: bool = False,
    base: str | None = None,
) -> list[str]:
    """Publish a trained folder as a version of a repository, after the stages that it was trained in.

    Each version is one commit to the main branch, which holds the folder's files and no others, and a tag. What an
    interrupted call has done is found and not done again. A stage of version v is published as v-stage-1-256, and
    passed over if it is there.

    Args:
        folder: of a finished run.
        repo: `user/name`; it is made where there is none.
        version: the tag.
        variant: weights to publish beside the plain ones.
        private: whether the repository must be private.
        base: `user/name` where an adapter's base is published; needed where it was a folder when the adapter was
            trained.

    Returns:
        The versions, in order.

    Raises:
        FileNotFoundError: if the folder is not complete.
        ValueError: if the version is no tag or exists, the repository or the base is not called `user/name`, a file
            must not be shared, an adapter has no such variant, or its base is on this machine only.
        HubError: if the Hub refuses.

    Source: our choice.
    """
    check_version(version)
    check_complete(folder)
    stages = stage_folders(folder)
    for stage in stages:
        check_complete(stage)
    for part in (*stages, folder):
        check_options(part, variant, base)
    check_repository_name(repo)
    if base is not None:
        check_repository_name(base, "base")
    folders = {f"{version}-{stage.name}": stage for stage in stages} | {version: folder}
    token = access_token()
    releases = _releases(folders, repo, base)
    for release in releases:
        check_shareable(release.content, token)
    repository = Repository(repo, private)
    if version in repository.tags():
        raise ValueError(f"`version` is {version!r}; {repo} has that tag already: choose another `--version`.")
    with TemporaryDirectory() as staging:
        if variant is not None:
            for release in releases:
                added = variant_content(folders[release.version], variant, Path(staging, release.version))
                release.content.update(added)
        for release in _missing(repository, releases):
            _publish(repository, release)
    return list(folders)


def check_version(version: str):
    """Raise a ValueError if a version cannot be a tag, or could be taken for a branch or a commit."""
    is_tag = re.fullmatch(r"[A-Za-z0-9][\w.+-]*", version, re.ASCII) and not re.search(r"\.\.|\.$|\.lock$", version)
    if not is_tag or version == "main" or re.fullmatch(r"[0-9a-f]{7,40}", version):
        raise ValueError(
            f"`version` is {version!r}; it must be the name of a tag, like v0.1: letters, digits, `.`, `_`, `+`, `-`."
        )


def _releases(folders: dict[str, Path], repo: str, base: str | None) -> list[Release]:
    """The versions, with their places on the Hub written into what follows them."""
    releases, places = [], {}
    for version, folder in folders.items():
        content = addressed(folder, folder_content(folder), repo, version, places, base)
        releases.append(Release(version, content))
        places[trained_as(folder)] = f"{repo}@{version}"
    return releases


def _missing(repository: Repository, releases: list[Release]) -> list[Release]:
    """The versions that have no tag yet; a tag that would have to be moved is an error before anything is uploaded."""
    tags = repository.tags()
    missing = [release for release in releases if release.version not in tags]
    for release in releases:
        if release in missing:
            continue
        if not repository.holds(tags[release.version], release.content):
            raise ValueError(
                f"`version` is {releases[-1].version!r}; {repository.name} has the tag {release.version!r} already, "
                "with other files: choose another `--version`."
            )
    return missing


def _publish(repository: Repository, release: Release):
    sizes = [source.stat().st_size if isinstance(source, Path) else len(source) for source in release.content.values()]
    logger.info("%s: %d files, %.1f MB", release.version, len(sizes), sum(sizes) / 1e6)
    commit = repository.commit(release.content, f"Publish {release.version}")
    repository.add_tag(release.version, commit)
    logger.info("%s: commit %s, tag %s", repository.name, commit[:7], release.version)
