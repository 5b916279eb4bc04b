"""The cards in `model_cards/` match the template and the configurations."""

import pytest
from huggingface_hub import ModelCard

from improved_ldm.hub.card import EVALUATION_PART, TEMPLATE
from improved_ldm.models.family import DENOISERS
from render_cards import CARDS, RECIPES, SIZES, family_card


def test_the_folder_holds_the_template_and_a_card_for_every_member():
    assert {file.name for file in CARDS.iterdir()} == {"card_template.md", *(f"{name}.md" for name in DENOISERS)}
    assert (CARDS / "card_template.md").resolve() == TEMPLATE.resolve()


@pytest.mark.parametrize("name", RECIPES)
def test_cards_are_up_to_date(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text == family_card(name), f"{name}.md: run `python training/render_cards.py`"
    assert all(f"\n| {size} | " in text for size in SIZES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_claims_nothing_of_a_model_that_is_not_there(name):
    card = ModelCard.load(CARDS / f"{name}.md")
    assert EVALUATION_PART.search(card.text)[0].strip() == "Not measured."
    assert "**No weights are published yet.**" in card.text
    assert "](samples.png)" not in card.text and "![" not in card.text
    assert "images seen" not in card.text and "device" not in card.text
    assert card.data.eval_results is None
    classes = name in ("dit", "mdt")
    assert card.data.datasets == (["ILSVRC/imagenet-1k"] if classes else ["pixparse/cc12m-wds"])
