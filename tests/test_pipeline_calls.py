"""Arguments that users of diffusers know: used if they have a meaning here, or else refused by name."""

import inspect
import re
from random import Random

import numpy as np
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SDCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.conditioning.control import CONTROL_PARTS, VARIABLES, Control, control_tensor
from improved_ldm.data.transforms import ImageTransform

NAMES = ["Coat", "Bag", "Ankle boot"]
HUGE = 10**9


def unchanged(pipeline, step, timestep, tensors):
    return tensors


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# of a call with `class_labels=[0, 1]`, 8 x 8 pixels in patches of 4
TAKEN = {
    "class_labels": [
        *([2, 0], (1, 2), np.array([0, 1]), torch.tensor([0, 1]), [np.int64(1), np.uint8(2)], [torch.tensor(1), 2]),
        *(["Coat", "Bag"], ("bag", 0), np.array(["Coat", "ankle boot"]), np.array([0, 1], dtype=np.int8)),
    ],
    "height": [8, 12, np.int64(8), np.array(8), torch.tensor(16), None],
    "width": [4, np.int32(12)],
    "num_inference_steps": [1, 2, np.int64(1), np.uint8(2), torch.tensor(1), None],
    "guidance_scale": [0, 1, 1.0, 7.5, np.float32(2), np.int64(3), torch.tensor(2.5), 1000, None],
    "control_guidance_scale": [0, 1, 2.5, np.float64(0.5)],
    "guidance_rescale": [0, 0.7, 1, np.float32(0.5)],
    "original_size": [
        *((64, 32), [64, 32], np.array([64, 32]), torch.tensor([64.0, 32.0]), (np.int64(64), 32.5), None),
        *([(64, 32), (8, 8)], [[64, 32], [8, 8]], np.ones((2, 2)) * 16, ((64, 32), (8, 8)), [None, (8, 8)]),
        [np.array([64, 32]), torch.tensor([8, 8])],
    ],
    "crops_coords_top_left": [(2, 3), [2, 3], np.array([0, 7]), [(0, 0), (1, 2)]],
    "crop_size": [(4, 4), [8, 2], torch.tensor([16, 16]), (0.5, 3)],
    "target_size": [(8, 8), [64, 64], np.array([8, 8])],
    "flip": [True, np.True_, 1, 0, torch.tensor(True), [True, False], (False, True), np.array([True, False]), [1, 0]],
    "num_images_per_prompt": [1, 2, np.int32(2)],
    "generator": [None, generators(1)[0], generators(2), tuple(generators(2))],
    "latents": [None, torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.float64)],
    "output_type": ["pil", "np", "pt", "latent", np.str_("np")],
    "return_dict": [True, False, np.False_],
    "callback_on_step_end": [None, unchanged, SDCFGCutoffCallback(), MultiPipelineCallbacks([])],
    "callback_on_step_end_tensor_inputs": [["latents"], (), None, ["prompt_embeds", "add_time_ids"]],
    "timesteps": [None],
    "attention_kwargs": [None, {}, {"scale": 1}, {"scale": np.float32(1.0)}],
    "joint_attention_kwargs": [{"scale": 1.0}],
    "cross_attention_kwargs": [{"scale": 1.0}],
}
NOT_A_NUMBER = [
    "3",
    True,
    [1.0, 2.0],
    (1,),
    {},
    float("nan"),
    float("inf"),
    -3,
    1e9,
    HUGE,
    10**400,
    np.array([2.0, 3.0]),
]
NOT_A_COUNT = [0, -1, 1.0, 2.5, "2", True, [2], (2, 2), HUGE, 10**5000, np.float64(1), np.array([1, 2]), float("nan")]
NOT_A_SIZE = [
    *(8, "8x8", (8,), (8, 0), (8, -1), (8, 8, 8), (), [], (True, 8), ("8", 8), (8, None), (float("nan"), 8), {}),
    *((HUGE, HUGE), (1e-300, 8), [(8, 8)], [(8, 8), 5], np.ones(3), torch.ones(1, 2), {8, 4}, (8, float("inf"))),
]
REFUSED = {
    "class_labels": [
        *(3, [0, -1], 1.5, [], True, [True, False], np.array([0.0, 1.0]), torch.tensor([True]), {}, HUGE, [[0, 1]]),
        *("Coats", ["Coat", "Boat"], [None], b"Coat", np.zeros((2, 2), dtype=int)),
    ],
    "height": [*NOT_A_COUNT, 10, "32", 8.0, 2**40],
    "width": [*NOT_A_COUNT, 2, 9],
    "num_inference_steps": [*NOT_A_COUNT, 1001],
    "guidance_scale": NOT_A_NUMBER,
    "control_guidance_scale": [*NOT_A_NUMBER, None],
    "guidance_rescale": [*NOT_A_NUMBER, 1.5, None],
    "original_size": NOT_A_SIZE,
    "crops_coords_top_left": [(-1, 0), (20, 20), (16, 0), "0", [(0, 0)], (0,), (HUGE, 0), (True, False)],
    "crop_size": NOT_A_SIZE,
    "target_size": NOT_A_SIZE,
    "flip": ["yes", 2, -1, [True], [True, 2], {}, 0.5, float("nan"), [[True, False]], np.array([0.5, 1.0])],
    "num_images_per_prompt": NOT_A_COUNT,
    "generator": [42, "0", generators(3), (), [0, 1], [*generators(1), None], np.random.default_rng(0), Random(0)],
    "latents": [
        *(np.zeros((2, 4, 4, 4), dtype=np.float32), torch.zeros(1, 4, 4, 4), torch.zeros(2, 4, 4, 4).int(), [0.0], 0),
        torch.zeros(2, 4),
    ],
    "output_type": ["jpeg", None, 3, ["pil"], b"pil", np.array(["pil", "np"])],
    "return_dict": ["yes", None, 2, []],
    "callback_on_step_end": [
        *(3, "latents", len, lambda: {}, lambda *args: 5, lambda *args: {"noise": 1}, lambda *args: {"latents": 3}),
        *(lambda *args: {"latents": torch.zeros(1)}, lambda *args: [torch.zeros(2, 4, 4, 4)]),
        *(IPAdapterScaleCutoffCallback(), MultiPipelineCallbacks([IPAdapterScaleCutoffCallback()])),
        SDXLControlnetCFGCutoffCallback(),
    ],
    "callback_on_step_end_tensor_inputs": ["latents", ["image"], [3], 3, {"latents": 1}],
    "timesteps": [[999, 500], 5, "999", []],  # this scheduler does not take any
    "sigmas": [[1.0, 0.5], [1.0]],
    "attention_kwargs": [
        {"scale": "1"},
        {"scale": float("nan")},
        {"ip_adapter_masks": 1},
        3,
        [("scale", 1)],
        {"scale": True},
    ],
    "joint_attention_kwargs": [{"scales": 1}, "scale"],
    "cross_attention_kwargs": [{"scale": HUGE}],
    "negative_prompt": ["a boot", ["a", "b"]],
    "prompt": ["a boot"],
    "prompt_embeds": [torch.zeros(2, 16, 96)],
}


def table(outcomes):
    return [
        pytest.param({name: value}, id=f"{name}-{i}") for name in outcomes for i, value in enumerate(outcomes[name])
    ]


@pytest.fixture
def labels_pipeline(class_pipeline):
    pipe = class_pipeline()
    pipe.register_to_config(class_names=NAMES, default_num_inference_steps=1, default_original_size=16)
    return pipe


@pytest.mark.parametrize("arguments", table(TAKEN))
def test_what_has_the_meaning_is_taken(labels_pipeline, arguments):
    call = {"class_labels": [0, 1], "output_type": "latent", **arguments}
    output = labels_pipeline(**call)
    images = output[0] if isinstance(output, tuple) else output.images
    assert len(images) == 2 * int(call.get("num_images_per_prompt", 1))


@pytest.mark.parametrize("arguments", table(REFUSED))
def test_what_has_no_meaning_is_refused_by_its_name(labels_pipeline, arguments):
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=f"`{name}`") as refusal:
        labels_pipeline(**{"class_labels": [0, 1], "output_type": "latent", **arguments})
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 500
    value = arguments[name]
    if type(value) in (str, bool, float) and name != "negative_prompt" and name != "prompt":
        assert repr(value) in message


TWO = ["a coat", "a bag"]
PROMPTS_TAKEN = [
    *({"prompt": value} for value in ("", "a coat", TWO[:1], ("a coat", ""), np.array(TWO), np.str_("a"))),
    *({"prompt": TWO, "negative_prompt": value} for value in ("a", "", TWO, tuple(TWO), np.array(TWO))),
]
PROMPTS_REFUSED = [
    *({"prompt": value} for value in (3, [], {}, b"a", [None], ["a", 3], {"a"}, [TWO], True, "\ud800", np.ones(1))),
    *({"prompt": TWO, "negative_prompt": value} for value in (3, ["a"], [], [None, "a"], b"a", {}, ("a", "b", "c"))),
    {"class_labels": 1},
]


@pytest.mark.parametrize("arguments", PROMPTS_TAKEN, ids=range(len(PROMPTS_TAKEN)))
def test_prompts_are_strings_in_any_sequence(text_pipeline, arguments):
    prompt = arguments["prompt"]
    images = text_pipeline()(**arguments, num_inference_steps=1, output_type="latent").images
    assert len(images) == (1 if isinstance(prompt, str) else len(prompt))


@pytest.mark.parametrize("arguments", PROMPTS_REFUSED, ids=range(len(PROMPTS_REFUSED)))
def test_other_prompts_are_refused(text_pipeline, arguments):
    with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}`"):
        text_pipeline()(**arguments, num_inference_steps=1, output_type="latent")


# the same images for every spelling


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ({"original_size": (64, 32)}, {"original_size": np.array([64, 32])}),
        ({"original_size": [(64, 32), (8, 8)]}, {"original_size": torch.tensor([[64, 32], [8, 8]])}),
        ({"flip": [True, False]}, {"flip": np.array([1, 0])}),
        ({"class_labels": [1, 2]}, {"class_labels": ("bag", "Ankle boot")}),
        ({"guidance_scale": 2.5}, {"guidance_scale": torch.tensor(2.5)}),
        ({"generator": generators(2)}, {"generator": tuple(generators(2))}),
    ],
)
def test_another_spelling_draws_the_same(labels_pipeline, plain, other):
    def draw(**arguments):
        call = {"class_labels": [0, 1], "generator": generators(2), "output_type": "latent", **arguments}
        return labels_pipeline(**call).images

    for generator in plain.get("generator", []):
        generator.manual_seed(0)
    for generator in other.get("generator", []):
        generator.manual_seed(0)
    assert torch.equal(draw(**plain), draw(**other))


def test_an_unknown_class_is_told_the_nearest_names(labels_pipeline):
    with pytest.raises(ValueError, match=r"'Ankle bot', which is no class; the nearest .* are 'Ankle boot', "):
        labels_pipeline(class_labels="Ankle bot")
    labels_pipeline.register_to_config(class_names=None)
    with pytest.raises(ValueError, match=r"`class_labels` has 'Coat'; labels must be integers from 0 to 2\."):
        labels_pipeline(class_labels="Coat")
    labels_pipeline.register_to_config(class_names=["Coat", "Bag", "coat"])
    assert labels_pipeline(class_labels="coat", output_type="latent").images.shape[0] == 1
    with pytest.raises(ValueError, match=r"the name of classes \[0, 2\]"):
        labels_pipeline(class_labels="COAT")


def test_a_corner_outside_the_image_is_named(labels_pipeline):
    with pytest.raises(
        ValueError, match=r"`crops_coords_top_left` is \(20, 4\); it must be inside .* \(16\.0, 16\.0\)"
    ):
        labels_pipeline(class_labels=0, crops_coords_top_left=(20, 4))


@pytest.mark.parametrize(("target_size", "warnings"), [((8, 16), 1), ((16, 16), 0), ([(8, 8), (8, 16)], 1)])
def test_another_aspect_ratio_than_the_drawn_one_is_said_once(labels_pipeline, caplog, target_size, warnings):
    labels_pipeline(class_labels=[0, 1], target_size=target_size, output_type="latent")
    said = [record.message for record in caplog.records if "`target_size`" in record.message]
    assert len(said) == warnings
    assert all("(8, 16)" in message and "`height` 8" in message for message in said)


def test_a_call_that_is_too_large_allocates_nothing(labels_pipeline):
    with pytest.raises(ValueError, match=r"`height` 524288 and `width` 524288 of 2 images"):
        labels_pipeline(class_labels=[0, 1], height=2**19, width=2**19)
    with pytest.raises(ValueError, match=r"`num_images_per_prompt` and the prompts give 120000 images"):
        labels_pipeline(class_labels=[0, 1], num_images_per_prompt=60000)


# every generated call works or names the wrong argument

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-1, 20), st.floats(), st.booleans(), st.text(max_size=2)), max_size=3),
    st.tuples(st.floats(), st.floats()),
    st.lists(st.tuples(st.integers(-1, 20), st.integers(-1, 20)), max_size=3).map(np.array),
    st.integers(-1, 20).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.lists(st.integers(-1, 20), max_size=3).map(torch.tensor),
    st.dictionaries(st.sampled_from(["scale", "latents"]), st.floats(), max_size=1),
    st.just(torch.zeros(1, 4, 4, 4)),
    st.just(len),
)


def mixed(outcomes, names=None):
    """Some arguments, each of them valid, invalid or unusual."""
    values = {name: st.one_of(st.sampled_from(outcomes.get(name) or [None]), ODD) for name in names or outcomes}
    return st.fixed_dictionaries({}, optional=values)


def works_or_names_an_argument(call, arguments):
    try:
        call(**arguments)
    except (ValueError, TypeError) as error:
        named = set(re.findall(r"`(?:callback )?(\w+)`", str(error)))
        assert named & set(arguments), f"{type(error).__name__}: {error}"


TEXT_ARGUMENTS = {
    "prompt": ["a coat", ["a", "b"]],
    "negative_prompt": ["a bag", ["a", "b"]],
    "prompt_embeds": [torch.zeros(2, 16, 96), torch.ones(1, 3, 96), torch.zeros(2, 16, 95)],
    "negative_prompt_embeds": [torch.zeros(2, 16, 96), torch.full((2, 16, 96), torch.nan)],
    "pooled_prompt_embeds": [torch.zeros(2, 96), torch.zeros(2, 1)],
    "prompt_attention_mask": [torch.ones(2, 16), torch.zeros(2, 16).bool(), torch.zeros(1, 3)],
    "timesteps": [[999, 1], [1, 999]],
}
BOTH = {name: [*TAKEN.get(name, []), *REFUSED.get(name, [])] for name in {**TAKEN, **REFUSED}} | TEXT_ARGUMENTS
SMALL = {name: value for name, value in BOTH.items() if name not in ("height", "width", "num_images_per_prompt")}
SEVERAL = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SEVERAL
@given(arguments=mixed(BOTH, TAKEN), label=st.sampled_from([0, [0, 1]]))
def test_every_call_of_classes_works_or_names_an_argument(labels_pipeline, arguments, label):
    works_or_names_an_argument(labels_pipeline, {"class_labels": label, "num_inference_steps": 1, **arguments})


@SEVERAL
@given(arguments=mixed(SMALL))
def test_every_call_of_prompts_works_or_names_an_argument(text_pipeline, arguments):
    arguments = {"prompt": "a coat", "num_inference_steps": 1, "output_type": "latent", **arguments}
    if "prompt_embeds" in arguments and len(arguments) % 2:
        del arguments["prompt"]
    works_or_names_an_argument(text_pipeline(), arguments)


SIZES = {name: [*TAKEN[name], *NOT_A_SIZE] for name in ("original_size", "crop_size", "target_size")}
RECORD = {**SIZES, "crops_coords_top_left": [(0, 0), [1, 2], (-1, 0)], "flip": [*TAKEN["flip"], *REFUSED["flip"]]}
TRANSFORM = {
    "resolution": [8, (8, 16), [8, 8], np.array([4, 8]), np.int64(4), *NOT_A_COUNT],
    "crop_policy": ["resize_then_crop", "crop_then_resize", "crop_at_target_scale", "other", 3, ["resize_then_crop"]],
    "crop_position": ["random", "centre", "center", None],
    "crop_probability": [0, 1, 0.5, 2, -1, "1", True],
    "min_crop": [0.5, 1, 1.0, 0, 1e-320, "1", True],
    "flip_probability": [0, 0.5, float("nan"), np.float32(0.5)],
    "reduce_probability": [0.5, 1, [1]],
    "min_original_size": [4, None, 0, 2.5, "4", np.int32(4), HUGE],
    "target_scale": [16, None, 4, "16", True],
}


@SEVERAL
@given(arguments=mixed(RECORD))
def test_every_control_record_works_or_names_an_argument(arguments):
    whole = {"original_size": (40, 40), "crops_coords_top_left": (0, 0), "crop_size": (8, 8), "target_size": (8, 8)}
    works_or_names_an_argument(lambda **values: Control(**values).to_row(), {**whole, **arguments})


@SEVERAL
@given(arguments=mixed(TRANSFORM), size=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_every_transform_works_or_names_an_argument(arguments, size):
    def draw(**values):
        control = ImageTransform(**values).sample_control(size, Random(0))
        row = control_tensor([control])[0].double()
        assert row[:9].tolist() == control.to_row()[:9]  # the values are those of float32

    works_or_names_an_argument(draw, {"resolution": 8, **arguments})


def test_records_and_transforms_read_values_as_the_pipeline_does():
    record = Control(np.array([40, 60]), [0, 2], torch.tensor([20.0, 20.0]), (np.int64(8), 8), np.True_)
    assert record == Control((40, 60), (0, 2), (20.0, 20.0), (8, 8), True)
    assert all(type(side) in (int, float) for side in (*record.original_size, *record.crop_size, *record.target_size))
    assert ImageTransform([8, np.int64(16)]) == ImageTransform((8, 16))
    with pytest.raises(ValueError, match=r"`crop_size` is \[8, 0\]; it must be two numbers from 1e-06 to 1048576"):
        Control((40, 60), (0, 0), [8, 0], (8, 8))
    with pytest.raises(ValueError, match=r"`flip_probability` is nan; it must be a number from 0 to 1"):
        ImageTransform(8, flip_probability=float("nan"))


def test_the_call_has_an_argument_for_every_control_variable():
    parameters = inspect.signature(ImprovedLDMPipeline.__call__).parameters
    for row in VARIABLES:
        assert parameters[row.name].default is None
        assert f"            {row.name}: " in ImprovedLDMPipeline.__call__.__doc__


@pytest.mark.parametrize("row", VARIABLES, ids=lambda row: row.name)
def test_every_control_argument_reaches_the_denoiser(class_pipeline, row):
    pipe, seen = class_pipeline(control_parts=CONTROL_PARTS), []
    pipe.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["control"]), with_kwargs=True)
    for arguments in row.shown((8, 8)).values() or [{row.name: (1, 1)}]:
        pipe(class_labels=0, guidance_scale=1, num_inference_steps=1, **arguments)
        (control,) = pipe.make_controls(1, 8, 8, **arguments)
        torch.testing.assert_close(seen.pop(), control_tensor([control]), equal_nan=True)
        assert getattr(control, row.name) == row.read(row.name, arguments[row.name])
