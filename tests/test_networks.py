import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf.diffusion.schedule import Step
from stable_diffusion_tf.networks import Networks


class Fake:
    """A network that is local arithmetic: `function` of its inputs, in `dtype`."""

    def __init__(self, function, dtype="float32"):
        self.function = function
        self.variables = ()
        self.outputs = [SimpleNamespace(dtype=dtype)]

    def __call__(self, inputs):
        return self.function(inputs)

    def skipping(self, clip_skip):
        return Fake(lambda ids: self(ids) / clip_skip)


FUNCTIONS = {
    "text_encoder": lambda ids: 1.0 * np.repeat(ids[..., None], 32, -1),
    "unet": lambda inputs: 0 * inputs[0],
    "encoder": lambda images: np.tile(images[:, ::2, ::2, :2], 4),  # 4 means, 4 log-variances
    "decoder": lambda latents: latents[..., :3].repeat(2, 1).repeat(2, 2),
}
STEP = Step(500.0, 0.8, 0.6)


class Watched:
    """Networks of fakes, and what was loaded and compiled for them."""

    def __init__(self, dtype="float32", **functions):
        self.loaded, self.compiled = [], 0
        self.functions, self.dtype = {**FUNCTIONS, **functions}, dtype
        self.networks = Networks(TINY, self.load, self.compile)

    def load(self, parts):
        self.loaded.append(tuple(parts))
        time.sleep(0.01)  # for other threads to come
        return {part: Fake(self.functions[part], self.dtype) for part in parts}

    def compile(self, function, variables):
        self.compiled += 1
        time.sleep(0.01)
        return function


@pytest.fixture
def watched():
    return Watched()


def test_networks_are_loaded_together_once_and_no_sooner_than_needed(watched):
    assert watched.loaded == []
    found = watched.networks.need("unet", "decoder")
    assert watched.loaded == [("unet", "decoder")]
    assert watched.networks["unet"] is found["unet"]
    watched.networks.need("encoder", "unet", "text_encoder")
    assert watched.loaded[1:] == [("encoder", "text_encoder")]


def test_networks_are_compiled_once_each(watched):
    for clip_skip in (1, 2, 1, 2):
        states = watched.networks.read(range(77), clip_skip)
        np.testing.assert_array_equal(states[:, 0], np.arange(77) / clip_skip)
    assert watched.compiled == 2
    for _ in range(2):
        watched.networks.decode(np.zeros((2, 3, 4, 4), np.float32))
        watched.networks.denoiser(np.zeros(0), None, None, None)
    assert watched.compiled == 4


def test_a_network_with_other_variables_is_compiled_again(watched):
    latents = np.zeros((1, 3, 4, 4), np.float32)
    watched.networks.decode(latents)
    watched.networks["decoder"].variables = ("new",)
    for _ in range(2):
        watched.networks.decode(latents)
    assert watched.compiled == 2


def test_encoding_gives_the_scaled_mean_or_a_sample(watched):
    image = np.full((1, 6, 8, 3), 0.75, np.float32)  # 0.5 in [-1, 1]: the mean and log-variance
    scale = TINY.autoencoder.scale
    np.testing.assert_allclose(watched.networks.encode(image), np.full((1, 3, 4, 4), 0.5 * scale))
    noise = np.full((1, 3, 4, 4), 2.0, np.float32)
    sample = (0.5 + 2 * np.exp(0.25)) * scale
    np.testing.assert_allclose(watched.networks.encode(image, noise), 0 * noise + sample, rtol=1e-6)


def test_what_is_larger_than_a_tile_is_seen_in_tiles():
    seen = []

    def decode(latents):
        seen.append(latents.shape)
        return FUNCTIONS["decoder"](latents)

    networks = Watched(decoder=decode).networks
    latents = np.random.default_rng(0).uniform(-1, 1, (2, 20, 9, 4)).astype(np.float32)
    whole = networks.decode(latents)
    assert seen == [(1, 20, 9, 4)] * 2
    networks.tile = 16 * TINY.autoencoder.factor
    np.testing.assert_allclose(networks.decode(latents), whole, rtol=0, atol=1e-6)
    assert set(seen[2:]) == {(1, 16, 9, 4)}


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("float16", "overflowed in float16; use dtype='bfloat16' or 'float32'"),
        ("float32", "overflowed in float32; lower the guidance scale, or take another checkpoint"),
    ],
)
def test_an_overflow_names_its_stage_and_the_remedy(dtype, remedy):
    networks = Watched(dtype, **dict.fromkeys(FUNCTIONS, lambda x: np.float32([[np.inf]]))).networks
    x = np.full((1, 8, 8, 4), np.nan)
    for stage, work in {
        "encoding the text": lambda: networks.read([0], 1),
        "encoding": lambda: networks.encode(x[..., :3]),
        "decoding": lambda: networks.decode(x),
        "denoising, step 3 of 4": lambda: networks.latents(x, "denoising, step 3 of 4"),
    }.items():
        with pytest.raises(FloatingPointError, match=f"^{stage}: the network {remedy}"):
            work()


def test_a_denoiser_gives_x0_of_what_the_network_sees(watched):
    x = np.ones((2, 3, 4, 4), np.float32)
    states = np.zeros((2, 77, 32), np.float32)
    denoise = watched.networks.denoiser(states, None, None, None)
    np.testing.assert_allclose(denoise(x, STEP), x / 0.8, rtol=1e-6)  # no noise is predicted


def test_guidance_shows_the_network_latents_and_channels_once_and_both_contexts():
    seen = []

    def unet(inputs):
        seen.append([tuple(x.shape) for x in inputs])
        latents, _, context = map(np.asarray, inputs)
        return np.tile(latents[..., :4], (2, 1, 1, 1)) * context[:, :1, None, :1]

    x, mask, grey = (np.full((2, 3, 4, c), c, np.float32) for c in (4, 1, 4))
    negative, positive = (np.full((2, 77, 32), value, np.float32) for value in (1, 3))
    networks = Watched(unet=unet).networks
    x0 = networks.denoiser(positive, negative, 2.0, None, (mask, grey))(x, STEP)
    assert seen == [[(2, 3, 4, 9), (2,), (4, 77, 32)]]
    np.testing.assert_allclose(x0, (x - 0.6 * (1 + 2 * (3 - 1)) * x) / 0.8, rtol=1e-5)


def test_what_was_compiled_goes_with_the_variables(watched):
    states = np.zeros((1, 77, 32), np.float32)
    unet = watched.networks["unet"]
    unet.keeping = unet.reusing = lambda: unet

    def use(reuse):
        watched.networks.denoiser(states, None, None, None, reuse=reuse)

    compile, former = watched.networks._compile, []

    def remembered(function, variables):
        former.append(weakref.ref(function))
        return compile(function, variables)

    watched.networks._compile = remembered
    use(1)
    use(2)
    assert len(former) == 3
    unet.variables = ("new",)
    use(1)
    gc.collect()
    assert [function() is None for function in former] == [True, True, True, False]


def test_threads_load_and_compile_once_between_them(watched):
    def work(_):
        watched.networks.decode(np.zeros((1, 3, 4, 4), np.float32))
        return watched.networks.read(range(77), 2)

    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(work, range(4))]) == 4
    assert watched.loaded == [("decoder",), ("text_encoder",)]
    assert watched.compiled == 2
