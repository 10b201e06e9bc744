"""PyTorch's numbers without PyTorch.

`data/torch_generator.npz` is what torch 2.13.0 drew on a CPU with AVX-512, for each of its `seeds`:
`rand`, `torch.rand(64)`; and `randn_HxW`, two draws of `torch.randn((1, 4, H, W))` in a row, each
from a fresh `torch.Generator().manual_seed(seed)`, the four channels last but for the batch of 1.
"""

import numpy as np
import pytest
import synth

from stable_diffusion_tf.samplers import Noise
from stable_diffusion_tf.samplers.torch_generator import TorchGenerator

GOLDEN = synth.golden("torch_generator")
SEEDS = GOLDEN["seeds"].tolist()
SHAPES = [name for name in GOLDEN if name.startswith("randn_")]


def test_uniform_numbers_are_theirs_bit_for_bit():
    ours = [TorchGenerator(seed).rand(64) for seed in SEEDS]
    np.testing.assert_array_equal(ours, GOLDEN["rand"])
    assert ours[0].dtype == np.float32


@pytest.mark.parametrize("name", SHAPES)
def test_normal_numbers_are_theirs(name):
    draws = GOLDEN[name]  # (seeds, 2, 4, h, w)
    ours = []
    for seed in SEEDS:
        generator = TorchGenerator(seed)
        ours.append([generator.randn(*draws.shape[2:]) for _ in range(2)])
    assert len(SHAPES) == len(SEEDS) == 10
    np.testing.assert_allclose(ours, draws, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_noise_is_what_their_users_get_with_a_generator_an_image(name):
    draws = GOLDEN[name].transpose(0, 1, 3, 4, 2)  # channels last
    noise = Noise(SEEDS, draws.shape[2:], rng="torch")
    for _ in range(2):  # what was drawn before can be had again
        np.testing.assert_allclose(noise.start(), draws[:, 0], rtol=0, atol=3e-6)
        np.testing.assert_allclose(noise(0), draws[:, 1], rtol=0, atol=3e-6)
    assert noise.start().dtype == np.float32
    without_start = Noise(SEEDS, draws.shape[2:], rng="torch")
    np.testing.assert_array_equal(without_start(0), noise.start())


@pytest.mark.parity
def test_numbers_are_those_of_live_torch():
    import torch

    for seed in SEEDS:
        theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
        for shape in [(3,), (16,), (1,), (1, 4, 5, 5), (15,), (2, 17), (1, 4, 64, 64), (7,)]:
            normal = torch.randn(shape, generator=theirs).numpy()
            np.testing.assert_allclose(ours.randn(*shape), normal, rtol=0, atol=3e-6)
            uniform = torch.rand(shape, generator=theirs).numpy()
            np.testing.assert_array_equal(ours.rand(*shape), uniform)
