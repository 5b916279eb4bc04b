"""The card of a trained adapter, rendered from its configuration and its metrics."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from improved_ldm.hub.card import card_data, card_parts, usage_lines
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import is_hub_id, shareable_place

TEMPLATE = Path(__file__).parent / "adapter_card_template.md"


def adapter_usage_lines(base: str, folder: str, pipeline: ImprovedLDMPipeline, prompt: str | int) -> str:
    """Lines of Python that load a base and an adapter and sample an image."""
    lines = usage_lines(base, pipeline, prompt).splitlines()
    loaded = next(number for number, line in enumerate(lines, 1) if line.startswith("pipe = "))
    return "\n".join([*lines[:loaded], f'pipe.load_lora_weights("{folder}")', *lines[loaded:]])


def write_adapter_card(
    folder: Path,
    pipeline: ImprovedLDMPipeline,
    config: dict[str, Any],
    metrics: dict[str, Any],
    prompt: str | int,
    picture: str | None,
) -> Path:
    """Write the card of a trained adapter as its README.md.

    Args:
        folder: Folder of the adapter.
        pipeline: Base pipeline with the adapter.
        config: Configuration of the run.
        metrics: Content of `metrics.json`. The card states no other numbers.
        prompt: Prompt or class label of the usage example.
        picture: File name of the sample grid; None shows no picture.

    Returns:
        The file of the card.
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
        usage=adapter_usage_lines(shareable_place(base), shareable_place(folder.as_posix()), pipeline, prompt),
    )
    file = folder / "README.md"
    card.save(file)
    return file


def name_base_on_hub(card: str, base: str, place: str) -> str:
    """Replace the base in a card of `write_adapter_card` by its repository on the Hub.

    Args:
        card: Text of the card.
        base: Folder or Hub id that the adapter was trained on, as named in the card.
        place: Repository `user/name` of the published base.

    Returns:
        The text with that repository in the front matter, the usage example and the tables.
    """
    for named in ('from_pretrained("{}")', "model `{}`", "| base | `{}` |"):  # the same name may mean something else
        card = card.replace(named.format(base), named.format(place))
    placed = ModelCard(card)
    placed.data.base_model = place
    return str(placed)
