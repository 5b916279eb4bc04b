"""What a run pushes to the Hub while it trains: its pipeline with the averaged weights, one commit a push."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from improved_ldm.hub.content import check_shareable, folder_content
from improved_ldm.hub.repository import Repository, access_token
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.adapters import put_into
from improved_ldm.trainer.finish import save_trained
from improved_ldm.trainer.run import Run


def pipeline_pusher(run: Run, pipeline: ImprovedLDMPipeline) -> Callable[[Denoiser, int], None] | None:
    """A function of a denoiser and a step that pushes the pipeline with that denoiser; None if a run pushes nothing.

    The repository is opened at once, so a wrong token or name shows before the data is encoded. The function is called
    on the main process. A push that fails is reported, and training goes on.

    Args:
        run: configuration, folder and processes.
        pipeline: that the denoiser belongs to.

    Raises:
        ValueError: if the repository's name is none, or it is public and must be private.
        HubError: if the Hub refuses the repository or its branch.
    """
    hub = run.config.hub
    if not hub.push_every:
        return None
    if run.accelerator.is_main_process:
        repository, token = Repository(hub.repo, hub.private), access_token()
        repository.add_branch(hub.branch)

    def push(denoiser: Denoiser, step: int):
        put_into(pipeline, denoiser)
        try:
            with TemporaryDirectory() as folder:
                save_trained(pipeline, Path(folder))
                content = folder_content(Path(folder)) | {"config.yaml": run.folder / "config.yaml"}
                check_shareable(content, token)
                commit = repository.commit(content, f"{run.folder.name}: step {step}", hub.branch)
        except Exception as error:
            run.say(f"step {step} was not pushed, training goes on: {error}")
        else:
            run.say(f"step {step} is commit {commit[:7]} of {hub.repo}, branch {hub.branch}")

    return push
