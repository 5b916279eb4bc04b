"""Publish trained folders on the Hub: one commit and one tag per version."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants

from improved_ldm.hub.adapter_base import check_base, published_base
from improved_ldm.hub.content import (
    Content,
    Variant,
    check_complete,
    check_options,
    check_shareable,
    folder_content,
    is_adapter,
    name_places_on_hub,
    trained_as,
    variant_content,
)
from improved_ldm.hub.local_folders import check_names_no_folders, rewrite_records
from improved_ldm.hub.repository import Repository, access_token
from improved_ldm.lineage import stage_folders
from improved_ldm.places import check_repository_name

logger = logging.getLogger(__name__)

TITLE = "Publish "  # start of a commit's title, before the version
STAGES_BRANCH = "stages"


@dataclass(frozen=True)
class Release:
    """A version to publish.

    Args:
        version: Name of the version.
        content: Its files.
        changed: Files that named local folders and no longer do in `content`.
    """

    version: str
    content: Content
    changed: tuple[str, ...]


def publish(
    folder: Path,
    repo: str,
    version: str,
    variant: Variant | None = None,
    private: bool = False,
    base: str | None = None,
    replace: bool = False,
) -> list[str]:
    """Publish a trained folder as a version of a repository, after the stages that it was trained in.

    A version is a tag and one commit that contains exactly the folder's files. The main branch moves only once, to the
    finished version, so loading it always gives either this version or the previous one. A stage of version v becomes
    for example v-stage-1-256, on the branch `stages`, and is skipped if it is published already. After an
    interruption, the same call resumes and repeats no finished step.

    Args:
        folder: Folder of a finished run.
        repo: Repository `user/name`; it is created if it does not exist.
        version: Name of the tag.
        variant: Variant of the weights to publish in addition to the plain ones.
        private: Whether the repository must be private.
        base: Repository `user/name` of an adapter's base; required if the adapter was trained on a local folder.
        replace: Whether to replace or remove files in the repository that this function did not publish. They are
            logged.

    Returns:
        The versions, in order.

    Raises:
        FileNotFoundError: If the folder is not complete.
        ValueError: If the version is not a valid tag or exists, the name of the repository or the base is not
            `user/name`, a file must not be shared, a variant of an adapter is requested, the adapter's base is only
            local, is not on the Hub or does not fit, or the repository contains files that were not published by this
            function.
        HubError: If the Hub refuses.

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
        check_names_no_folders(release.content)
    if is_adapter(folder):
        check_base(folder, base)
    repository = Repository(repo, private)
    tags = repository.tags()
    if version in tags and not repository.holds(tags[version], releases[-1].content, only=False):
        raise ValueError(
            f"`version` is {version!r}; {repo} already has this tag with other files: choose another `--version`."
        )
    _check_foreign(repository, releases, replace)
    with TemporaryDirectory() as staging:
        if variant is not None:
            for release in releases:
                added = variant_content(folders[release.version], variant, Path(staging, release.version))
                release.content.update(added)
        missing = _missing(repository, releases)
        if not missing:
            logger.info("%s: %s is already published", repo, version)
        for release in missing:
            _publish(repository, release, is_stage=release is not releases[-1])
    return list(folders)


def loading_lines(folder: Path, repo: str, versions: list[str], base: str | None = None) -> list[str]:
    """Lines of Python that load the versions returned by `publish`, given the same arguments."""
    addresses = [f'"{repo}", revision="{version}"' for version in versions]
    imports = ["import improved_ldm", "from diffusers import DiffusionPipeline"]
    if not is_adapter(folder):
        return [*imports, *(f"DiffusionPipeline.from_pretrained({address})" for address in addresses)]
    loaded = f'pipe = DiffusionPipeline.from_pretrained("{published_base(folder, base)}")'
    return [*imports, loaded, *(f"pipe.load_lora_weights({address})" for address in addresses)]


def check_version(version: str):
    """Raise a ValueError if a version is not a valid tag, or could be mistaken for a branch or a commit."""
    is_tag = re.fullmatch(r"[A-Za-z0-9][\w.+-]*", version, re.ASCII) and not re.search(r"\.\.|\.$|\.lock$", version)
    if (
        not is_tag
        or version in (constants.DEFAULT_REVISION, STAGES_BRANCH)
        or re.fullmatch(r"[0-9a-f]{7,40}", version)
    ):
        raise ValueError(
            f"`version` is {version!r}; it must be the name of a tag, such as v0.1, of letters, digits and `._+-`."
        )


def _releases(folders: dict[str, Path], repo: str, base: str | None) -> list[Release]:
    """The versions in order. Each names the places of the earlier ones on the Hub."""
    releases, places = [], {}
    for version, folder in folders.items():
        content = name_places_on_hub(folder, folder_content(folder), repo, version, places, base)
        changed = rewrite_records(content)
        releases.append(Release(version, content | changed, tuple(changed)))
        places[trained_as(folder)] = f"{repo}@{version}"
    return releases


def _missing(repository: Repository, releases: list[Release]) -> list[Release]:
    """The versions without a tag. Raises an error before any upload if a tag exists with other files."""
    tags = repository.tags()
    missing = [release for release in releases if release.version not in tags]
    for release in releases:
        if release in missing:
            continue
        if not repository.holds(tags[release.version], release.content):
            raise ValueError(
                f"`version` is {releases[-1].version!r}; {repository.name} already has the tag {release.version!r} "
                "with other files: choose another `--version`."
            )
    return missing


def _check_foreign(repository: Repository, releases: list[Release], replace: bool):
    """Raise a ValueError if files that `publish` did not write would be replaced or removed and `replace` is false."""
    *stages, last = releases
    foreign = repository.foreign(last.content, _is_ours)
    if stages:
        others = repository.foreign(stages[0].content, _is_ours, STAGES_BRANCH)
        foreign += [f"{path} of the branch {STAGES_BRANCH}" for path in others]
    if not foreign:
        return
    names = ", ".join(foreign)
    if not replace:
        raise ValueError(
            f"`repo` is {repository.name!r}, which contains files that were not published by this command and would "
            f"be replaced or removed: {names}. Choose another `--repo`, or allow it with `--replace true`."
        )
    logger.warning("%s: `replace` is true, these files are replaced or removed: %s", repository.name, names)


def _is_ours(title: str) -> bool:
    """Whether a commit with this title was made by `publish`."""
    return title.startswith(TITLE)


def _publish(repository: Repository, release: Release, is_stage: bool):
    sizes = [source.stat().st_size if isinstance(source, Path) else len(source) for source in release.content.values()]
    logger.info("%s: %d files, %.1f MB", release.version, len(sizes), sum(sizes) / 1e6)
    if release.changed:
        logger.info("%s: local folders are left out of %s", release.version, ", ".join(release.changed))
    branch = constants.DEFAULT_REVISION
    if is_stage:
        branch = STAGES_BRANCH
        repository.add_branch(branch)
    commit = repository.commit(release.content, f"{TITLE}{release.version}", branch)
    repository.add_tag(release.version, commit)
    logger.info("%s: commit %s, tag %s", repository.name, commit[:7], release.version)
