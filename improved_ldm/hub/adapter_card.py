"""The card of a trained adapter, rendered from its configuration and its metrics."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from improved_ldm.data.sources import is_hub_id
from improved_ldm.hub.card import card_data, card_parts, usage_lines
from improved_ldm.pipeline import ImprovedLDMPipeline

TEMPLATE = Path(__file__).parent / "adapter_card_template.md"


def adapter_usage_lines(base: str, folder: str, pipeline: ImprovedLDMPipeline, prompt: str | int) -> str:
    """Lines of Python that load a base and an adapter, and draw."""
    lines = usage_lines(base, pipeline, prompt).splitlines()
    loaded = next(number for number, line in enumerate(lines, 1) if line.startswith("pipe = "))
    return "\n".join([*lines[:loaded], f'pipe.load_lora_weights("{folder}")', *lines[loaded:]])


def write_adapter_card(
    folder: Path,
    pipeline: ImprovedLDMPipeline,
    config: dict[str, Any],
    metrics: dict[str, Any],
    prompt: str | int,
    picture: str,
) -> Path:
    """Write the card of a trained adapter as its README.md.

    Args:
        folder: of the adapter.
        pipeline: the base with the adapter.
        config: the run's configuration.
        metrics: what `metrics.json` holds; the card claims nothing else.
        prompt: for the lines of use.
        picture: file name of the sample grid.

    Returns:
        The file.
    """
    lora, base = config["lora"], config["base"]
    kind = ("rank-stabilised " if lora["rslora"] else "") + ("DoRA" if lora["dora"] else "LoRA")
    card = ModelCard.from_template(
        card_data(folder.name, pipeline, config, ["lora"], base_model=base if is_hub_id(base) else None),
        template_path=str(TEMPLATE),
        **card_parts(pipeline, config, metrics),
        name=folder.name,
        kind=kind,
        alpha=lora["alpha"] or lora["rank"],
        picture=picture,
        usage=adapter_usage_lines(base, folder.as_posix(), pipeline, prompt),
    )
    file = folder / "README.md"
    card.save(file)
    return file


def place_base(card: str, base: str, place: str) -> str:
    """A card of `write_adapter_card` that names a place on the Hub where it named another base.

    Args:
        card: the text of the card.
        base: folder or Hub id that the adapter was trained on.
        place: `user/name`, where that base is published.

    Returns:
        The text with that place in the front matter, the lines of use and the tables.
    """
    placed = ModelCard(card.replace(f'("{base}")', f'("{place}")').replace(f"`{base}`", f"`{place}`"))
    placed.data.base_model = place
    return str(placed)
