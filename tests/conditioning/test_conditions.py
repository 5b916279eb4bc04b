import pytest
import torch
from torch.testing import assert_close

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import Control, control_tensor

NUM_CLASSES = 5
SEMANTIC = torch.tensor([True, False, True, False])
CONTROL = torch.tensor([True, True, False, False])


def bundle(batch_size=4):
    return Conditioning(
        encoder_hidden_states=torch.randn(batch_size, 3, 6),
        encoder_attention_mask=torch.arange(3).expand(batch_size, 3) < 2,
        pooled_projections=torch.randn(batch_size, 7),
        class_labels=torch.arange(batch_size),
        control=control_tensor([Control.of_whole_image((8, 8), (8, 8))] * batch_size),
    )


def test_dropping_replaces_the_chosen_rows_of_each_axis_by_their_nulls():
    full = bundle()
    dropped = full.dropped(SEMANTIC, CONTROL, NUM_CLASSES)
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert getattr(dropped, name)[SEMANTIC].isnan().all()
    assert dropped.encoder_attention_mask[SEMANTIC].all()
    assert (dropped.class_labels[SEMANTIC] == NUM_CLASSES).all()
    assert dropped.control[CONTROL].isnan().all()


def test_dropping_leaves_the_other_rows():
    full = bundle()
    dropped = full.dropped(SEMANTIC, CONTROL, NUM_CLASSES)
    for name, value in dropped.kwargs().items():
        kept = ~(CONTROL if name == "control" else SEMANTIC)
        assert_close(value[kept], getattr(full, name)[kept], rtol=0, atol=0, equal_nan=True)
        assert value.dtype == getattr(full, name).dtype


def test_dropping_nothing_changes_nothing():
    full, none = bundle(), torch.zeros(4, dtype=torch.bool)
    for name, value in full.dropped(none, none, NUM_CLASSES).kwargs().items():
        assert_close(value, getattr(full, name), rtol=0, atol=0, equal_nan=True)


def test_unused_conditions_stay_unused():
    labels = Conditioning(class_labels=torch.arange(4))
    for result in (
        labels.dropped(SEMANTIC, CONTROL, NUM_CLASSES),
        labels.without_semantic(NUM_CLASSES),
        labels.without_control(),
        labels.to("cpu", torch.float16),
        Conditioning.concatenate([labels, labels]),
    ):
        assert {name for name, value in result.kwargs().items() if value is not None} == {"class_labels"}


def test_concatenation_keeps_the_order():
    first, second = bundle(2), bundle(3)
    for name, value in Conditioning.concatenate([first, second]).kwargs().items():
        assert_close(value[:2], getattr(first, name), rtol=0, atol=0, equal_nan=True)
        assert_close(value[2:], getattr(second, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", [1, -1])
def test_bundles_of_different_conditions_do_not_concatenate(order):
    parts = [bundle(), bundle().only(frozenset({"class_labels"}))][::order]
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        Conditioning.concatenate(parts)


def test_only_keeps_the_named_conditions():
    kept = bundle().only(frozenset({"class_labels", "control"})).kwargs()
    assert {name for name, value in kept.items() if value is not None} == {"class_labels", "control"}


def test_a_dtype_converts_text_and_not_control_or_labels():
    moved = bundle().to("cpu", torch.float16)
    assert moved.encoder_hidden_states.dtype == moved.pooled_projections.dtype == torch.float16
    assert moved.control.dtype == torch.float32
    assert moved.class_labels.dtype == torch.int64
    assert moved.encoder_attention_mask.dtype == torch.bool


def test_null_text_survives_half_precision():
    assert bundle().without_semantic(NUM_CLASSES).to("cpu", torch.float16).encoder_hidden_states.isnan().all()
