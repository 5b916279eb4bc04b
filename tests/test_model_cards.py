"""`model_cards/` is what the template and the configurations make."""

import pytest
from huggingface_hub import ModelCard
from render_cards import CARDS, RECIPES, family_cards

from improved_ldm.hub.card import EVALUATION_PART, TEMPLATE
from improved_ldm.models.presets import DENOISERS

FILES = {f"{name}-{size}-2.md" for name in DENOISERS for size in ("S", "B", "L", "XL")}


def test_the_folder_holds_the_template_and_a_card_for_every_member_and_size():
    assert {file.name for file in CARDS.iterdir()} == {"card_template.md", *FILES}
    assert (CARDS / "card_template.md").resolve() == TEMPLATE.resolve()


@pytest.mark.parametrize("name", RECIPES)
def test_cards_are_up_to_date(name):
    for file, text in family_cards(name).items():
        assert (CARDS / file).read_text() == text, f"{file}: run `python training/render_cards.py`"


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_card_claims_nothing_of_a_model_that_is_not_there(file):
    card = ModelCard.load(CARDS / file)
    assert EVALUATION_PART.search(card.text)[0].strip() == "Not measured."
    assert "**No weights are published yet.**" in card.text
    assert "](samples.png)" not in card.text and "![" not in card.text
    assert "images seen" not in card.text and "device" not in card.text
    assert card.data.eval_results is None
    classes = file.startswith(("dit", "mdt"))
    assert card.data.datasets == (["ILSVRC/imagenet-1k"] if classes else ["pixparse/cc12m-wds"])
