"""Denoisers as graphs and functions: export with any batch size, torch.func transforms, second derivatives."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

from improved_ldm.models.family import DENOISERS
from improved_ldm.models.norm import ModulatedNorm

MODES = ("disentangled", "published")
BATCH = Dim("batch", max=63)  # the upsampling of diffusers in a UNet takes another branch from 64 on


def exported(denoiser, inputs, strict=False):
    shapes = {name: {0: BATCH} for name in inputs} | {"return_dict": None}
    arguments = inputs | {"return_dict": False}
    with torch.no_grad():
        return export(denoiser, (), kwargs=arguments, dynamic_shapes=shapes, strict=strict).module()


def check_batches(denoiser, make_inputs, left_out=(), strict=False):
    def inputs(batch_size):
        made = make_inputs(denoiser, batch_size=batch_size, seed=batch_size)
        return {name: value for name, value in made.items() if name not in left_out}

    graph = exported(denoiser, inputs(3), strict)
    for batch_size in (1, 5):
        with torch.no_grad():
            plain = denoiser(**inputs(batch_size)).sample
            assert_close(graph(**inputs(batch_size), return_dict=False)[0], plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_exports_with_any_batch(tiny_denoiser, make_inputs, name, mode):
    check_batches(tiny_denoiser(name, conditioning=mode, num_classes=5), make_inputs)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_exports_without_control(tiny_denoiser, make_inputs, name):
    check_batches(tiny_denoiser(name, num_classes=5), make_inputs, left_out=["control"])


@pytest.mark.slow
def test_every_case_exports(denoiser, make_inputs):
    check_batches(denoiser, make_inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_exports_strictly(tiny_denoiser, make_inputs, name, mode):
    check_batches(tiny_denoiser(name, conditioning=mode, num_classes=5), make_inputs, strict=True)


@pytest.fixture(params=[(name, mode) for name in DENOISERS for mode in MODES], ids="-".join)
def loss_of(request, tiny_denoiser, make_inputs):
    """A denoiser in float64 whose attention has all derivatives, and its loss as a function of the latents."""
    name, mode = request.param
    denoiser = tiny_denoiser(name, conditioning=mode, num_classes=5).double()
    inputs = {**make_inputs(denoiser), "timestep": torch.tensor([100.0, 700.0])}
    latents = inputs.pop("hidden_states").double()

    def loss(latents, parameters=None):
        arguments = {**inputs, "hidden_states": latents}
        return functional_call(denoiser, parameters or {}, (), arguments).sample.square().mean()

    with attention_backend("_native_math"):  # only in this test
        yield denoiser, latents, loss


def test_gradients_of_functions_are_those_of_backward(loss_of):
    denoiser, latents, loss = loss_of
    parameters = {name: value.detach() for name, value in denoiser.named_parameters()}
    functional = grad(lambda values: loss(latents, values))(parameters)
    loss(latents).backward()
    for name, parameter in denoiser.named_parameters():
        assert_close(functional[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def test_forward_mode_agrees_with_backward(loss_of):
    _, latents, loss = loss_of
    direction = torch.randn_like(latents)
    _, tangent = jvp(loss, (latents,), (direction,))
    assert_close(tangent, (grad(loss)(latents) * direction).sum())


def test_second_derivatives_agree_in_every_mode(loss_of):
    _, latents, loss = loss_of
    direction = torch.randn_like(latents)
    _, forward_over_reverse = jvp(grad(loss), (latents,), (direction,))
    leaf = latents.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad((first * direction).sum(), leaf)
    assert reverse_over_reverse.abs().max() > 0
    assert_close(forward_over_reverse, reverse_over_reverse)
    step = 1e-4
    difference = (grad(loss)(latents + step * direction) - grad(loss)(latents - step * direction)) / (2 * step)
    assert_close(reverse_over_reverse, difference, rtol=1e-3, atol=1e-7)


def test_many_inputs_go_through_one_function(loss_of):
    _, latents, loss = loss_of
    several = torch.stack([latents, 2 * latents, latents - 1])
    assert_close(vmap(grad(loss))(several), torch.stack([grad(loss)(one) for one in several]))


@pytest.mark.parametrize("needs", [(0,), (1, 2), (0, 1, 2)])
def test_the_norm_has_every_derivative(needs):
    inputs = [torch.randn(2, tokens, 8, dtype=torch.float64) for tokens in (3, 1, 1)]
    for index in needs:
        inputs[index].requires_grad_()
    norm = ModulatedNorm(8)
    assert torch.autograd.gradcheck(
        norm, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(norm, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_whether_they_are_differentiated(dtype):
    inputs = [torch.randn(2, tokens, 8, dtype=dtype, requires_grad=True) for tokens in (3, 1, 1)]
    output = ModulatedNorm(8)(*inputs)
    plain = torch.autograd.grad(output.sin().sum(), inputs, retain_graph=True)
    differentiable = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    assert_close(differentiable, plain, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
