import torch
from torch.testing import assert_close

from improved_ldm.models.layers import OutputLayer, PatchEmbedding


def test_a_token_is_predicted_where_its_patch_was(randomize):
    grid, dim = (2, 3), 8
    layer = randomize(OutputLayer(dim, 2, 4))
    tokens, embedding = torch.randn(1, 6, dim), torch.randn(1, dim)
    plain = layer(tokens, embedding, grid)
    for index in range(6):
        other = tokens.clone()
        other[:, index] = torch.randn(dim)
        changed = (layer(other, embedding, grid) != plain).any(1)[0]
        row, column = 2 * (index // 3), 2 * (index % 3)
        assert changed[row : row + 2, column : column + 2].all()
        assert changed.sum() == 4


def test_channels_of_a_patch_are_the_last_axis_of_its_values():
    layer = OutputLayer(8, 2, 4)
    layer.linear.weight.data.zero_()
    layer.linear.bias.data = torch.arange(16.0)
    patch = layer(torch.randn(1, 1, 8), torch.randn(1, 8), (1, 1))
    assert_close(patch[0], torch.arange(16.0).view(2, 2, 4).permute(2, 0, 1))


def test_patches_are_read_row_by_row():
    layer = PatchEmbedding(1, 4, 2)
    layer.proj.weight.data = torch.eye(4).view(4, 1, 2, 2)
    layer.proj.bias.data.zero_()
    latents = torch.arange(24.0).view(1, 1, 4, 6)
    assert_close(layer(latents)[0, [0, 1, 3], 0], torch.tensor([0.0, 2.0, 12.0]))
