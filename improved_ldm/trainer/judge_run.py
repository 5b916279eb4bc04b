"""The training of a judge, from labelled images to a classifier that judges samples."""

from improved_ldm.data.mixture import Mixture
from improved_ldm.trainer.data import count_classes, open_labelled
from improved_ldm.trainer.judge_task import JudgeTask
from improved_ldm.trainer.network_config import JudgeRunConfig
from improved_ldm.trainer.network_run import train_network
from improved_ldm.trainer.run import Run


def train_judge(config: JudgeRunConfig):
    """Train a judge on labelled images, and save it with its accuracy.

    Raises:
        ValueError, OSError: as in `train_network`, or if the number of classes is not known.
    """

    def make_task(run: Run, mixture: Mixture) -> JudgeTask:
        return JudgeTask(config, count_classes(config.data, mixture))

    train_network(config, open_labelled, make_task)
