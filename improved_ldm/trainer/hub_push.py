"""Pushes to the Hub during a run: its pipeline with the averaged weights, one commit per push."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.hub.content import check_shareable, folder_content
from improved_ldm.hub.local_folders import check_names_no_folders, rewrite_records
from improved_ldm.hub.repository import Repository, access_token
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.adapters import set_trained
from improved_ldm.trainer.finish import save_trained
from improved_ldm.trainer.run import Run


def pipeline_pusher(
    run: Run, pipeline: ImprovedLDMPipeline, control_seen: ControlRanges | None = None
) -> Callable[[Denoiser, int], None] | None:
    """A function of a denoiser and a step that pushes the pipeline with that denoiser; None if a run pushes nothing.

    The repository is opened at once, so a wrong token or name is reported before the data is encoded. The function is
    called on the main process. If a push fails, this is reported and training continues.

    Args:
        run: configuration, folder and processes.
        pipeline: pipeline of the denoiser.
        control_seen: see `set_trained`.

    Raises:
        ValueError: if the repository's name is not valid, or the repository is public but must be private.
        HubError: if the Hub refuses the repository or its branch.
    """
    hub = run.config.hub
    if not hub.push_every:
        return None
    if run.accelerator.is_main_process:
        repository, token = Repository(hub.repo, hub.private), access_token()
        repository.add_branch(hub.branch)

    def push(denoiser: Denoiser, step: int):
        set_trained(pipeline, denoiser, control_seen)
        try:
            with TemporaryDirectory() as folder:
                save_trained(pipeline, Path(folder))
                content = folder_content(Path(folder)) | {"config.yaml": run.folder / "config.yaml"}
                content |= rewrite_records(content)
                check_shareable(content, token)
                check_names_no_folders(content)
                commit = repository.commit(content, f"{run.folder.name}: step {step}", hub.branch)
        except Exception as error:
            run.say(f"step {step} was not pushed, training continues: {error}")
        else:
            run.say(f"step {step} is commit {commit[:7]} of {hub.repo}, branch {hub.branch}")

    return push
