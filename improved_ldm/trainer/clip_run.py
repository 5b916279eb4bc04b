"""The training of a CLIP pair, from captioned images to a text tower for a denoiser and a score of samples."""

import itertools
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import CLIPTokenizer

from improved_ldm.data.mixture import Mixture
from improved_ldm.data.spread import spread_if_possible
from improved_ldm.data.token_counts import TokenCounts
from improved_ldm.provenance import write_json
from improved_ldm.trainer.checkpoints import VOCABULARY, kept_file
from improved_ldm.trainer.clip_model import fitting_max_tokens, learn_merges, make_tokenizer
from improved_ldm.trainer.clip_task import ClipTask
from improved_ldm.trainer.data import open_sets, text_columns
from improved_ldm.trainer.data_sections import DataConfig, SourceConfig
from improved_ldm.trainer.network_config import ClipRunConfig
from improved_ldm.trainer.network_run import train_network
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

READ_CAPTIONS = 100_000  # captions that the tokenizer is learned from


def train_clip(config: ClipRunConfig):
    """Train a CLIP pair on captioned images, and save it with its tokenizer and how well it tells captions apart.

    Raises:
        ValueError, OSError: as in `train_network`.
    """

    def make_task(run: Run, mixture: Mixture) -> ClipTask:
        return ClipTask(config, open_tokenizer(run, mixture))

    train_network(config, partial(open_captioned, by_label=config.clip.match == "label"), make_task)


def open_captioned(config: DataConfig, keys: Mapping[str, str], by_label: bool) -> Mixture:
    """Open the sets of a run with captions and, if images match by it, with labels; as `open_sets`."""

    def columns(source: SourceConfig) -> dict[str, Any]:
        return text_columns(source) | ({"label_column": source.label_column} if by_label else {})

    return open_sets(config, columns, keys, reads_labels=by_label)


def open_tokenizer(run: Run, mixture: Mixture) -> CLIPTokenizer:
    """The tokenizer of a run, learned from its captions or, if the run resumes, as it was; says how captions fit."""
    file = run.folder / VOCABULARY
    kept = kept_file(run.folder / "checkpoints", VOCABULARY)
    known = None if kept is None else json.loads(kept.read_text(encoding="utf-8"))
    known = on_main_process(lambda: known or _learn(run, mixture))
    if run.accelerator.is_main_process:
        write_json(file, known)
    return make_tokenizer(**known)


def _learn(run: Run, mixture: Mixture) -> dict[str, Any]:
    """The arguments of `make_tokenizer`."""
    captions = list(read_captions(mixture))
    merges = learn_merges(captions, run.config.clip.max_merges)
    counts = TokenCounts(make_tokenizer(merges))
    counts.add(captions)
    max_tokens = run.config.clip.max_tokens or fitting_max_tokens(counts)
    cut = counts.longer_than(max_tokens) / counts.lengths.total()
    run.say(
        f"{len(merges):,} words and word parts learned from {len(captions):,} captions, whose median is "
        f"{counts.quantile(0.5)} tokens; {cut:.1%} have more than the {max_tokens} tokens of a prompt and are cut"
    )
    return {"merges": merges, "max_tokens": max_tokens}


def read_captions(mixture: Mixture) -> list[str]:
    """Captions from all over the sets, at most `READ_CAPTIONS`."""
    each = -(-READ_CAPTIONS // len(mixture.rows))
    return [
        caption
        for rows in mixture.rows
        for caption in itertools.islice(spread_if_possible(rows, each).captions(), each)
        if caption
    ]
