import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import signature

import keras
import layouts
import numpy as np
import pytest
import synth
from keras import tree
from PIL import Image, ImageDraw
from tiny import FILES, TINY

from stable_diffusion_tf import (
    CheckpointError,
    DownloadError,
    StableDiffusion,
    arguments,
    networks,
)
from stable_diffusion_tf.checkpoints.catalog import PRESETS, STABLE_DIFFUSION
from stable_diffusion_tf.checkpoints.hub import HubFile
from stable_diffusion_tf.checkpoints.load import load
from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.compile import backend
from stable_diffusion_tf.config import UNetConfig
from stable_diffusion_tf.images import load_image, resize, unit_to_uint8
from stable_diffusion_tf.samplers import SAMPLERS, Noise

PROMPT = "a red apple"


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "jit"])
def sd(request, tiny_model):
    """Of the goldens' size; checks in both modes, where compiled code runs."""
    return StableDiffusion.from_pretrained(
        tiny_model, img_height=32, img_width=48, jit_compile=request.param
    )


@pytest.fixture(scope="module")
def small(tiny_model):
    """Of odd latents, for what does not depend on how it is compiled."""
    return StableDiffusion.from_pretrained(tiny_model, img_height=14, img_width=10)


@pytest.fixture(scope="module")
def inpainting(tiny_inpainting):
    return StableDiffusion.from_pretrained(tiny_inpainting, img_height=32, img_width=48)


def latents(sd, *args, **settings):
    return sd.generate(*args, **{"output": "latents", "progress": False, **settings})


@pytest.fixture(scope="module")
def golden():
    return synth.golden("tiny_pipeline")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t2i_ddim10", {}),
        ("t2i_ddim10_rescale0.7", {"guidance_rescale": 0.7}),
        ("t2i_ddim10_noguidance", {"unconditional_guidance_scale": 1}),
        ("t2i_ddim10_image01", {"output": "float"}),
    ],
)
def test_pictures_are_the_references(sd, golden, name, settings):
    states = np.asarray(sd.text_encoder(golden["ids"]))
    result = latents(
        sd,
        None,
        num_steps=10,
        context=states[:2],
        negative_context=states[2:],
        diffusion_noise=synth.inputs("Atiny_pipeline/x_T", (2, 16, 24, 4)),
        **{"unconditional_guidance_scale": float(golden["guidance"]), **settings},
    )
    assert result.dtype == np.float32
    assert synth.relative_error(result, golden[name]) <= 1e-4


@pytest.mark.parametrize(
    "name", [name for name in synth.golden("tiny_pipeline") if name.startswith(("i2i", "inpaint"))]
)
def test_pictures_drawn_on_are_the_references(sd, inpainting, golden, name):
    task, sampler, num_steps, strength = re.fullmatch(
        r"(i2i|inpaint4|inpaint9)_(\w+?)(\d+)(?:_strength(.+))?", name
    ).groups()
    noise = {"i2i": f"i2i{strength}", "inpaint4": f"inp{strength}", "inpaint9": "inp9"}[task]
    model = inpainting if task == "inpaint9" else sd
    states = np.asarray(model.text_encoder(golden["ids"]))
    result = latents(
        model,
        None,
        num_steps=int(num_steps),
        sampler=sampler,
        context=states[:2],
        negative_context=states[2:],
        unconditional_guidance_scale=float(golden["guidance"]),
        input_image=1 / (1 + np.exp(-synth.inputs("Atiny_pipeline/image", (2, 32, 48, 3)))),
        input_mask=None if task == "i2i" else golden["mask"],
        input_image_strength=float(strength or 1),
        diffusion_noise=synth.inputs(f"Atiny_pipeline/{noise}/noise0", (2, 16, 24, 4)),
    )
    assert synth.relative_error(result, golden[name]) <= 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"unconditional_guidance_scale": 7.5, "eta": 1.0},
        {"unconditional_guidance_scale": 1.0, "sampler": "euler_ancestral"},
    ],
)
def test_an_image_is_the_same_alone_and_in_a_batch(sd, settings):
    batch = latents(sd, PROMPT, "blue", batch_size=5, num_steps=5, seed=7, **settings)
    for i in range(5):
        (alone,) = latents(sd, PROMPT, "blue", num_steps=5, seed=7 + i, **settings)
        assert synth.relative_error(alone, batch[i]) <= 1e-5
    assert synth.relative_error(batch[0], batch[1]) > 0.1


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (14, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((14, 10), bool)
    mask[3:9, 2:7] = True
    return mask


@pytest.mark.parametrize(
    ("num_steps", "strength", "run"),
    [(10, 0.5, 5), (10, 0.59, 5), (10, 1, 10), (10, 0.01, 1), (50, 0.02, 1), (1, 0.5, 1)],
)
def test_strength_is_the_share_of_steps_that_run(
    small, photo, monkeypatch, num_steps, strength, run
):
    seen = []
    networks = small._networks
    original = networks._denoise
    monkeypatch.setitem(
        networks.__dict__, "_denoise", lambda x, *args: seen.append(x) or original(x, *args)
    )
    settings = {"num_steps": num_steps, "input_image": photo, "input_image_strength": strength}
    latents(small, PROMPT, **settings)
    assert len(seen) == run


def test_images_come_from_anywhere(small, photo, tmp_path):
    settings = {"num_steps": 2, "seed": 0}
    Image.fromarray(photo).save(tmp_path / "photo.png")
    found = latents(small, PROMPT, input_image=photo, **settings)
    path = tmp_path / "photo.png"
    unit = photo / np.float32(255)
    for source in (path, str(path), Image.fromarray(photo), unit, unit[None], [photo], (path,)):
        np.testing.assert_array_equal(latents(small, PROMPT, input_image=source, **settings), found)


def test_images_and_masks_are_stretched_to_the_models_size(small, photo, mask):
    def enlarged(array):
        return np.repeat(np.repeat(array, 4, 0), 3, 1)

    settings = {"num_steps": 2, "seed": 0, "progress": False, "input_image_strength": 1}
    for size in ((1, 1), (1, 20000)):
        grey, white = np.full((*size, 3), 99, np.uint8), np.ones(size, bool)
        small.generate(PROMPT, input_image=grey, input_mask=white, **settings)
        kept = small.generate(PROMPT, input_image=grey, input_mask=mask, **settings)
        np.testing.assert_array_equal(kept[:, ~mask], np.full((1, (~mask).sum(), 3), 99))
    found = small.generate(PROMPT, input_image=photo, input_mask=mask, **settings)
    again = small.generate(PROMPT, input_image=photo, input_mask=enlarged(mask), **settings)
    np.testing.assert_array_equal(found, again)


def test_several_images_give_one_picture_each(small, photo, mask):
    photos, masks = [photo, photo[::-1]], np.stack([mask, mask[::-1]])[..., None]
    settings = {"num_steps": 2, "input_image_strength": 1}
    together = latents(small, PROMPT, input_image=photos, input_mask=masks, seed=5, **settings)
    for i in range(2):
        (alone,) = latents(
            small, PROMPT, input_image=photos[i], input_mask=masks[i], seed=5 + i, **settings
        )
        assert synth.relative_error(alone, together[i]) <= 1e-5
    shared = latents(small, ["a", "b"], input_image=photo, input_mask=masks, **settings)
    assert shared.shape == (2, 7, 5, 4)


@pytest.mark.parametrize("model", ["small", "inpainting"])
@pytest.mark.parametrize("strength", [0.5, 1])
def test_what_is_not_masked_is_the_original_exactly(request, photo, mask, model, strength):
    sd = request.getfixturevalue(model)
    shape = (sd.img_height, sd.img_width)
    image = np.random.default_rng(0).random((*shape, 3), dtype=np.float32)
    mask = np.zeros(shape, bool)
    mask[3:9, 2:7] = True
    settings = {"input_mask": mask, "input_image_strength": strength, "seed": 0}
    settings |= {"num_steps": 2, "batch_size": 2, "progress": False}
    found = sd.generate(PROMPT, input_image=image, output="float", **settings)
    np.testing.assert_array_equal(found[:, ~mask], [image[~mask]] * 2)
    assert abs(found[:, mask] - image[mask]).mean() > 0.01

    image = np.rint(image * 255).astype(np.uint8)
    sharp = sd.generate(PROMPT, input_image=image, **settings)
    soft = sd.generate(PROMPT, input_image=image, mask_feather=3, **settings)
    np.testing.assert_array_equal(sharp[:, ~mask], [image[~mask]] * 2)
    np.testing.assert_array_equal(soft[:, ~mask], [image[~mask]] * 2)
    assert abs(soft - image.astype(float)).sum() < abs(sharp - image.astype(float)).sum()


def test_diffusion_noise_is_the_noise_on_the_image(small, photo, mask):
    noise = np.random.default_rng(1).standard_normal((1, 7, 5, 4))
    for settings in ({}, {"input_mask": mask}, {"input_mask": mask, "input_image_strength": 1}):
        settings = {"num_steps": 3, "input_image": photo, **settings}
        found = [latents(small, PROMPT, diffusion_noise=noise, seed=s, **settings) for s in (1, 2)]
        np.testing.assert_array_equal(*found)


def test_the_posterior_is_sampled_on_request(small, photo):
    mean, half = small.encode_image([photo] * 2), np.full((2, 7, 5, 4), 0.5)
    np.testing.assert_array_equal(small.encode_image([photo] * 2, 0 * half), mean)
    sampled = [small.encode_image([photo] * 2, noise) for noise in (half, 2 * half)]
    np.testing.assert_allclose(sampled[1] - mean, 2 * (sampled[0] - mean), rtol=0, atol=1e-5)
    deviation = (sampled[1] - mean) / TINY.autoencoder.scale
    moments = np.asarray(small.image_encoder(photo[None] / np.float32(127.5) - 1))
    expected = np.exp(moments[..., 4:] / 2)
    np.testing.assert_allclose(deviation[:1], expected, rtol=1e-3, atol=1e-4)

    settings = {"input_image": photo, "num_steps": 2, "batch_size": 2}
    found = [latents(small, PROMPT, sample_posterior=s, seed=0, **settings) for s in (0, 1)]
    assert synth.relative_error(found[1], found[0]) > 1e-3


@pytest.mark.parametrize(
    ("strength", "draws"),
    [(0.5, ["posterior 0", "start", "posterior 1"]), (1, ["start", "posterior 0"])],
)
def test_an_inpainting_model_s_posteriors_are_drawn_as_diffusers_does(
    inpainting, photo, mask, monkeypatch, strength, draws
):
    drawn, original = [], Noise._draw
    names = {0: "start", 2**64 - 1: "posterior 0", 2**64 - 2: "posterior 1"}
    monkeypatch.setattr(Noise, "_draw", lambda *at: drawn.append(names[at[1]]) or original(*at))
    settings = {"input_image": photo, "input_mask": mask, "input_image_strength": strength}
    latents(inpainting, PROMPT, num_steps=2, sample_posterior=True, **settings)
    assert drawn == draws


def test_the_embedded_model_draws_over_pictures():
    sd = StableDiffusion.from_pretrained("emoji")
    disc = Image.new("RGB", (4 * sd.img_width, 4 * sd.img_height), "white")
    ImageDraw.Draw(disc).ellipse([40, 40, 200, 200], fill="red")
    disc = unit_to_uint8(resize(load_image(disc), sd.img_height, sd.img_width))

    def draw(strength, num_steps, **settings):
        settings |= {"input_image_strength": strength, "num_steps": num_steps, "seed": 0}
        return sd.generate("apple", input_image=disc, progress=False, **settings)[0]

    def error(picture, other):
        return np.sqrt(((picture / 255.0 - other / 255.0) ** 2).mean())

    (decoded,) = sd.decode(sd.encode_image(disc[None]))
    assert error(draw(0.02, 50), decoded) < 0.03 < 0.1 < error(draw(1, 2), decoded)

    mask = np.zeros(disc.shape[:2], bool)
    mask[20:40, 24:50] = True
    np.testing.assert_array_equal(draw(1, 2, input_mask=mask)[~mask], disc[~mask])


@pytest.fixture
def evaluations(small, monkeypatch):
    """The model, and by which of its networks it has been called, the latest last."""
    seen = []

    def spied(name, original):
        return lambda *args: seen.append(name) or original(*args)

    networks = small._networks
    for name in ("_denoise", "_denoise_keeping", "_denoise_reusing"):
        monkeypatch.setitem(networks.__dict__, name, spied(name, getattr(networks, name)))
    return seen


@pytest.mark.parametrize(
    ("settings", "whole", "shallow"),
    [
        ({}, 3, 4),
        ({"sampler": "heun"}, 5, 8),
        ({"sampler": "pndm"}, 3, 5),
        ({"unconditional_guidance_scale": 1}, 3, 4),
        ({"batch_size": 2, "guidance_rescale": 0.7}, 3, 4),
        ({"input_image": np.ones((4, 4, 3)), "input_image_strength": 0.8}, 2, 3),
    ],
)
def test_features_are_computed_at_every_nth_call_and_reused_between(
    small, evaluations, settings, whole, shallow
):
    settings = {"num_steps": 7, "seed": 0, **settings}
    expected = latents(small, PROMPT, **settings)
    assert evaluations == ["_denoise"] * (whole + shallow)
    evaluations.clear()
    np.testing.assert_array_equal(latents(small, PROMPT, reuse=1, **settings), expected)
    assert set(evaluations) == {"_denoise"}
    evaluations.clear()
    found = latents(small, PROMPT, reuse=3, **settings)
    calls = whole + shallow
    assert evaluations == [f"_denoise_{'reusing' if i % 3 else 'keeping'}" for i in range(calls)]
    assert evaluations.count("_denoise_keeping") == whole
    assert 1e-6 < synth.relative_error(found, expected) < 0.5


def test_features_of_the_same_step_draw_the_same_picture(sd, monkeypatch):
    """Every call twice, at the same latents: first whole, then on the features of that."""
    ddim = SAMPLERS["ddim"].sample

    def twice(denoise, *args, **options):
        return ddim(lambda *at: (denoise(*at), denoise(*at))[1], *args, **options)

    settings = {"num_steps": 3, "batch_size": 2, "seed": 0}
    expected = latents(sd, PROMPT, "blue", **settings)
    monkeypatch.setitem(SAMPLERS, "ddim", replace(SAMPLERS["ddim"], sample=twice))
    found = latents(sd, PROMPT, "blue", reuse=2, **settings)
    assert synth.relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("strength", [0.5, 1])
def test_reuse_goes_with_inpainting(small, inpainting, strength):
    for sd in (small, inpainting):
        shape = sd.img_height, sd.img_width
        mask = np.zeros(shape, bool)
        mask[3:9, 2:7] = True
        photo = np.random.default_rng(0).random((*shape, 3))
        settings = {"input_image": photo, "input_mask": mask, "input_image_strength": strength}
        settings |= {"num_steps": 6, "seed": 0}
        found, expected = (latents(sd, PROMPT, reuse=n, **settings) for n in (2, 1))
        assert 1e-6 < synth.relative_error(found, expected) < 0.5


def test_nothing_but_another_shape_compiles_again(tiny_model, monkeypatch):
    traces = []

    def counted(*args):
        traces.append(args)
        return original(*args)

    original = networks.denoiser
    monkeypatch.setattr(networks, "denoiser", counted)
    sd = StableDiffusion.from_pretrained(tiny_model)
    for prompt, steps, guidance in (("a", 3, 2.0), ("b", 2, 7.5)):
        latents(sd, prompt, num_steps=steps, unconditional_guidance_scale=guidance)
    assert len(traces) == 1
    latents(sd, ["a", "b"], num_steps=1)
    assert len(traces) == 2


def test_outputs_are_one_picture_in_three_forms(small):
    settings = {"batch_size": 2, "num_steps": 2, "seed": 0}
    found = {
        output: small.generate(PROMPT, output=output, progress=False, **settings)
        for output in ("image", "float", "latents")
    }
    assert found["image"].shape == found["float"].shape == (2, 14, 10, 3)
    assert found["latents"].shape == (2, 7, 5, 4)
    assert [found[output].dtype for output in found] == [np.uint8, np.float32, np.float32]
    np.testing.assert_array_equal(found["image"], np.rint(found["float"] * 255))
    np.testing.assert_array_equal(found["image"], small.decode(found["latents"]))


def test_prompts_give_one_picture_each(small):
    together = latents(small, ["a", "b", "a"], ["x", "y", "z"], num_steps=2, seed=5)
    for i, (prompt, negative) in enumerate(zip("aba", "xyz", strict=True)):
        (alone,) = latents(small, prompt, negative, num_steps=2, seed=5 + i)
        assert synth.relative_error(alone, together[i]) <= 1e-5
    again = latents(small, ("a", "b", "a"), ["x", "y", "z"], batch_size=3, num_steps=2, seed=5)
    np.testing.assert_array_equal(again, together)


def test_a_context_is_a_prompt_that_has_been_read(small):
    settings = {"batch_size": 2, "num_steps": 2, "seed": 5}
    read = latents(small, PROMPT, "blue", **settings)
    (context, negative) = small.encode_text([PROMPT, "blue"])
    for given in (context, context[None], np.stack([context] * 2)):
        found = latents(small, None, "blue", context=given, **settings)
        np.testing.assert_array_equal(found, read)
    found = latents(small, PROMPT, negative_context=negative, **settings)
    np.testing.assert_array_equal(found, read)
    without = latents(small, PROMPT, **settings)
    np.testing.assert_array_equal(without, latents(small, PROMPT, "", **settings))
    assert synth.relative_error(without, read) > 1e-3


def test_networks_are_compiled_once_a_shape(tiny_model, monkeypatch):
    sd = StableDiffusion.from_pretrained(tiny_model)
    traced = []
    for network in (sd.diffusion_model, sd.image_decoder):

        def call(inputs, *args, of=network, original=network.call, **kwargs):
            traced.append((of.name, *(x.shape[0] for x in tree.flatten(inputs))))
            return original(inputs, *args, **kwargs)

        monkeypatch.setattr(network, "call", call)
    for settings in (
        {"seed": 1},
        {"seed": 2, "num_steps": 3, "unconditional_guidance_scale": 5},
        {"sampler": "euler_ancestral", "negative_prompt": "a dog"},
    ):
        sd.generate(PROMPT, progress=False, **{"num_steps": 2, **settings})
    # Latents and timesteps once, with both contexts.
    assert traced == [("diffusion_model", 1, 1, 2), ("image_decoder", 1)]
    sd.generate(PROMPT, num_steps=2, unconditional_guidance_scale=1, progress=False)
    assert traced[2:] == [("diffusion_model", 1, 1, 1)]


def test_each_distinct_chunk_is_read_once(small, monkeypatch):
    seen = []

    def read(ids):
        seen.append(ids)
        return np.zeros((1, 77, 32), np.float32) + len(seen)

    monkeypatch.setattr(small._networks, "_reader", lambda clip_skip: read)
    states = small.encode_text(["a", "b", "(a:2)", "a"])
    assert [ids.shape for ids in seen] == [(1, 77)] * 2
    np.testing.assert_array_equal(states[[0, 1, 3], 0, 0], [1, 2, 1])
    assert small.encode_text("a").shape == (1, 77, 32)
    assert len(seen) == 3


def written_out(sd, *tokens):
    """The states of one chunk of (words, weight), as their definition says."""
    ids, weights = [49406], [1.0]
    for words, weight in tokens:
        found = sd.tokenizer.encode(words)
        ids += found
        weights += [weight] * len(found)
    ids += [49407] * (77 - len(ids))
    weights += [1.0] * (77 - len(weights))
    states = np.asarray(sd.text_encoder(np.array([ids])), np.float64)[0]
    emphasised = states * np.array(weights)[:, None]
    return emphasised * states.mean() / emphasised.mean()


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red apple", [[("a red apple", 1)]]),
        ("a (red:1.3) apple", [[("a", 1), ("red", 1.3), ("apple", 1)]]),
        ("a ((red) apple), [leaf]", [[("a", 1), ("red", 1.21), ("apple", 1.1), (",", 1),
                                      ("leaf", 1 / 1.1)]]),
        ("(red:0) apple (leaf:-1)", [[("red", 0), ("apple", 1), ("leaf", -1)]]),
        (r"a \(red\) apple", [[("a (red) apple", 1)]]),
        ("a cat BREAK (noto style:1.5)", [[("a cat", 1)], [("noto style", 1.5)]]),
        ("cat " * 70 + "(red dog " * 10, [[("cat " * 70, 1), *[("red dog", 1.1**n) for n in (1, 2)],
            ("red", 1.1**3)], [("dog", 1.1**3), *[("red dog", 1.1**n) for n in range(4, 11)]]]),
    ],
)  # fmt: skip
def test_emphasis_and_chunks_are_those_of_the_written_out_definition(small, prompt, chunks):
    (found,) = small.encode_text(prompt)
    expected = np.concatenate([written_out(small, *chunk) for chunk in chunks])
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert synth.relative_error(found, expected) <= 1e-6
    assert abs(found - expected).max() <= 1e-5


def test_plain_text_has_the_encoders_very_states(small):
    ids = small.tokenizer.tokenize([PROMPT, "a (cat)"])
    read = small._networks._reader(1)
    for text, row in zip([PROMPT, "a (cat)"], ids, strict=True):
        found = small.encode_text(text, emphasis=False)
        np.testing.assert_array_equal(found, np.asarray(read(row[None])))
    np.testing.assert_array_equal(small.encode_text(PROMPT), np.asarray(read(ids[:1])))


def test_shorter_prompts_are_filled_up_and_that_is_said(small, monkeypatch, caplog):
    monkeypatch.setattr(small, "_warn_of_size", lambda *_: None)
    long = "cat " * 80
    (empty,) = small.encode_text("")
    assert caplog.messages == []
    states = small.encode_text([long, "dog"])
    assert states.shape == (2, 154, 32)
    np.testing.assert_array_equal(states[1], np.concatenate([small.encode_text("dog")[0], empty]))
    (message,) = caplog.messages
    assert "chunks of 75 tokens, here 2" in message

    settings = {"num_steps": 2, "seed": 3}
    found = latents(small, "dog", long, **settings)
    (negative,) = small.encode_text(long)
    same = latents(small, None, context=states[1], negative_context=negative, **settings)
    np.testing.assert_array_equal(found, same)
    short = small.encode_text("dog")
    same = latents(small, None, context=short, negative_context=negative, **settings)
    np.testing.assert_array_equal(found, same)
    caplog.clear()
    latents(small, "dog", long, unconditional_guidance_scale=1, **settings)
    (message,) = caplog.messages  # and not of chunks
    assert "no effect without guidance" in message
    caplog.clear()
    latents(small, "dog", ["", ""], unconditional_guidance_scale=1, batch_size=2, **settings)
    assert caplog.messages == []


def test_clip_skip(small):
    ids = small.tokenizer.tokenize([PROMPT])
    early = np.asarray(small.text_encoder.skipping(2)(ids))
    states = small.encode_text(PROMPT, clip_skip=2)
    assert synth.relative_error(states, early) <= 1e-6
    assert synth.relative_error(states, small.encode_text(PROMPT)) > 1e-2
    settings = {"num_steps": 1, "seed": 0, "clip_skip": 2, "unconditional_guidance_scale": 1}
    np.testing.assert_array_equal(
        latents(small, PROMPT, **settings), latents(small, None, context=states, **settings)
    )


def test_each_picture_has_the_seed_of_a_list(small):
    together = latents(small, PROMPT, batch_size=3, num_steps=1, seed=[5, 3, 5])
    assert small.last_seed == 5
    assert synth.relative_error(together[0], together[2]) <= 1e-5
    counted = latents(small, PROMPT, batch_size=3, num_steps=1, seed=3)
    assert synth.relative_error(together[:2], counted[[2, 0]]) <= 1e-5


def test_a_torch_seed_is_the_start_and_the_noise_of_torch(small):
    draws = synth.golden("torch_generator")["randn_5x7"][2:5, 0]  # of seeds 2, 42 and 1234
    noise = draws.reshape(3, 4, 7, 5).transpose(0, 2, 3, 1)
    settings = {"num_steps": 1, "batch_size": 3, "seed": [2, 42, 1234], "rng": "torch"}
    found = latents(small, PROMPT, **settings)
    given = latents(small, PROMPT, diffusion_noise=noise, **settings)
    assert synth.relative_error(found, given) <= 1e-5
    assert synth.relative_error(found, latents(small, PROMPT, **{**settings, "rng": "numpy"})) > 0.1


def test_defaults_are_the_models_own(tiny_model, small):
    sd = StableDiffusion.from_pretrained(tiny_model)
    assert (sd.img_height, sd.img_width) == (TINY.image_size, TINY.image_size)
    settings = {"num_steps": 2, "seed": 0}
    found = latents(small, PROMPT, **settings)
    named = latents(small, PROMPT, unconditional_guidance_scale=TINY.guidance, **settings)
    np.testing.assert_array_equal(found, named)


def test_without_guidance_there_is_no_unconditional_half(small):
    settings = {"num_steps": 2, "seed": 0}
    one = latents(small, PROMPT, unconditional_guidance_scale=1, **settings)
    for scale in (0, 0.5, -1.0):
        other = latents(small, PROMPT, "blue", unconditional_guidance_scale=scale, **settings)
        np.testing.assert_array_equal(one, other)


def test_a_seed_that_is_drawn_is_logged_and_draws_the_same_again(small, monkeypatch, caplog):
    monkeypatch.setattr(small, "_warn_of_size", lambda *_: None)
    with caplog.at_level(logging.INFO, "stable_diffusion_tf"):
        found = latents(small, PROMPT, num_steps=1, seed=-1)
    seed = small.last_seed
    assert caplog.messages == [f"seed {seed}"]
    np.testing.assert_array_equal(latents(small, PROMPT, num_steps=1, seed=seed), found)
    latents(small, PROMPT, num_steps=1, seed=0)
    assert small.last_seed == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(small, sampler):
    found = latents(small, PROMPT, num_steps=3, seed=0, sampler=sampler)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_schedule_moves_the_noise_levels(small, sampler):
    settings = {"num_steps": 3, "seed": 0, "sampler": sampler}
    own, karras = (
        latents(small, PROMPT, schedule=schedule, **settings) for schedule in (None, "karras")
    )
    assert np.isfinite(karras).all()
    assert synth.relative_error(karras, own) > 1e-3


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("ddpm", 0.0)])
def test_temperature_scales_added_noise(small, sampler, eta):
    def draw(temperature, seed):
        noise = np.ones((1, 7, 5, 4))
        settings = {"sampler": sampler, "eta": eta, "diffusion_noise": noise, "num_steps": 3}
        return latents(small, PROMPT, temperature=temperature, seed=seed, **settings)

    np.testing.assert_array_equal(draw(0, 1), draw(0, 2))
    assert not np.array_equal(draw(1, 1), draw(1, 2))


def test_encoded_images_are_the_posteriors_scaled_mean(sd):
    golden = synth.golden("tiny_vae")
    images = np.tanh(synth.inputs("Atiny_vae/image", golden["image_shape"])) / 2 + 0.5
    mean = golden["moments"][..., :4] * TINY.autoencoder.scale
    assert synth.relative_error(sd.encode_image(images), mean) <= 1e-4


def test_images_are_arrays_or_pictures(small):
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    found = small.encode_image(images)
    assert found.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(found, small.encode_image(images.astype(np.float32) / 255))
    pictures = [Image.fromarray(image) for image in images]
    np.testing.assert_array_equal(found, small.encode_image(pictures))
    np.testing.assert_array_equal(found, small.encode_image(keras.ops.convert_to_tensor(images)))
    for one in (images[0], pictures[0]):
        np.testing.assert_array_equal(small.encode_image(one), small.encode_image(images[:1]))


def test_large_pictures_go_through_the_autoencoder_in_tiles(tiny_model, monkeypatch):
    sd = StableDiffusion.from_pretrained(tiny_model, img_height=38, img_width=26)
    seen = []

    def encode(x):  # local, so that tiles must give what the whole does
        seen.append(x.shape)
        return np.tile(x[:, ::2, ::2, :2], 4)

    def decode(x):
        seen.append(x.shape)
        return x[..., :3].repeat(2, 1).repeat(2, 2)

    monkeypatch.setitem(sd._networks.__dict__, "_encoder", encode)
    monkeypatch.setitem(sd._networks.__dict__, "_decoder", decode)
    images = np.random.default_rng(0).random((2, 38, 26, 3), np.float32)
    codes = sd.encode_image(images)
    pictures = sd._networks.decode(codes)
    assert sd.tile == 256
    assert seen == [(1, 38, 26, 3)] * 2 + [(1, 19, 13, 4)] * 2

    seen.clear()
    sd.tile = 16
    np.testing.assert_allclose(sd.encode_image(images), codes, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sd._networks.decode(codes), pictures, rtol=0, atol=1e-6)
    sd.generate(PROMPT, input_image=images, num_steps=2, seed=0, progress=False)
    assert set(seen) == {(1, 16, 16, 3), (1, 8, 8, 4)}


def test_the_embedded_models_tiles_differ_little_from_the_whole():
    sd = StableDiffusion.from_pretrained("emoji", img_height=128, img_width=128)
    disc = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(disc).ellipse([60, 60, 452, 400], fill="red")
    codes = sd.encode_image([disc.resize((128, 128))])
    whole = sd._networks.decode(codes)
    sd.tile = 64  # the norms of a tile all in red are not those of the whole
    assert 0 < np.sqrt(((sd._networks.decode(codes) - whole) ** 2).mean()) < 0.04


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (None, TypeError, "tile must be a whole number of pixels, not None"),
        (17, ValueError, "tile must be a multiple of 2 .*, 16 or more, not 17; .* 16 or 18"),
        (14, ValueError, "16 or more, not 14; for example 16"),
    ],
)
def test_a_tile_is_of_a_size_that_fits_the_model(small, pixels, error, message):
    with pytest.raises(error, match=message):
        small.tile = pixels
    assert small.tile == 256


@pytest.mark.parametrize(
    ("output", "dtype", "message"),
    [
        ("latents", "mixed_float16", "denoising, step 1 of 3: .* in float16; use dtype='bfloat16'"),
        ("image", "float32", "decoding: .* in float32; lower the guidance scale"),
        ("float", "float32", "decoding: "),
    ],
)
def test_overflow_is_an_error_whatever_is_asked_for(tiny_model, output, dtype, message):
    sd = StableDiffusion.from_pretrained(tiny_model, img_height=4, img_width=4, dtype=dtype)
    layer = (
        sd.diffusion_model.get_layer("conv_out")
        if output == "latents"
        else sd.image_decoder.get_layer("decoder.conv_out")
    )
    layer.bias.assign(np.full(layer.bias.shape, np.inf))
    with pytest.raises(FloatingPointError, match=message):
        sd.generate(PROMPT, num_steps=3, output=output, progress=False)


def test_overflow_in_the_text_encoder_is_called_that(tiny_model):
    sd = StableDiffusion.from_pretrained(tiny_model, dtype="bfloat16")
    beta = sd.text_encoder.get_layer("final_layer_norm").beta
    beta.assign(np.full(beta.shape, np.nan))
    with pytest.raises(FloatingPointError, match=r"encoding the text: .* in bfloat16"):
        sd.generate(PROMPT, progress=False)


def test_what_is_no_model_is_told_so():
    with pytest.raises(TypeError, match=r"models must be .*from_pretrained"):
        StableDiffusion.from_models("emoji")
    with pytest.raises(TypeError, match=r"source must be a model's name, .*, not 512"):
        StableDiffusion.from_pretrained(512)


def test_networks_in_memory_draw_as_they_are_now(tiny_model):
    models = load(tiny_model)
    sd = StableDiffusion.from_models(models)
    assert (sd.img_height, sd.img_width) == (TINY.image_size, TINY.image_size)
    assert sd.diffusion_model is models.unet and sd.image_encoder is models.encoder
    settings = {"num_steps": 1, "seed": 0}
    before = latents(sd, PROMPT, **settings)
    opened = StableDiffusion.from_pretrained(tiny_model)
    np.testing.assert_array_equal(before, latents(opened, PROMPT, **settings))
    bias = models.unet.get_layer("conv_out").bias
    bias.assign(np.ones(bias.shape))
    assert synth.relative_error(latents(sd, PROMPT, **settings), before) > 1e-3


def test_the_bar_says_that_it_compiles_when_it_does(tiny_model, capsys):
    sd = StableDiffusion.from_pretrained(tiny_model)
    sd.generate(PROMPT, num_steps=2)
    shown = capsys.readouterr().err
    stages = re.findall(r"([A-Z][\w ]+): compiling", shown)
    assert list(dict.fromkeys(stages)) == ["Encoding the text", "Denoising", "Decoding"]
    assert shown.splitlines()[-1].startswith("Drawn: 100%")
    sd.generate(PROMPT, num_steps=2)
    assert "compiling" not in capsys.readouterr().err
    sd.generate(PROMPT, num_steps=3, reuse=2)  # which compiles twice while it denoises
    assert "compiling: compiling" not in capsys.readouterr().err


def test_the_bar_names_the_stages(small, photo, capsys):
    small.generate(PROMPT, num_steps=2)
    shown = capsys.readouterr().err
    for stage in ("Loading the model", "Encoding the text", "Denoising", "Decoding"):
        assert stage in shown
    assert "Encoding the image" not in shown
    small.generate(PROMPT, num_steps=2, input_image=photo)
    assert "Encoding the image" in capsys.readouterr().err
    small.generate(PROMPT, num_steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_a_callback_is_told_of_every_step(small, photo, mask):
    for given, total in (({}, 4), ({"input_image": photo, "input_mask": mask}, 2)):
        settings = {"num_steps": 4, "batch_size": 2, "seed": 0, **given}
        told = []
        found = latents(
            small, PROMPT, callback=lambda *args, told=told: told.append(args), **settings
        )
        np.testing.assert_array_equal(found, latents(small, PROMPT, **settings))
        assert [args[:2] for args in told] == [(step, total) for step in range(1, total + 1)]
        for _, _, preview in told:
            assert np.asarray(preview).shape == preview.shape == (2, 7, 5, 3)
            assert preview[1].dtype == np.uint8


def test_a_preview_is_not_computed_before_it_is_looked_at(small, monkeypatch):
    computed = []
    monkeypatch.setattr(small._networks, "preview", computed.append)
    previews = []
    latents(small, PROMPT, num_steps=2, callback=lambda *args: previews.append(args[2]))
    assert computed == []
    np.asarray(previews[1])
    assert len(computed) == 1


def test_too_little_memory_has_a_remedy(small, monkeypatch):
    def decode(latents):
        raise RuntimeError("it takes too much")

    monkeypatch.setattr(small._networks, "decode", decode)
    monkeypatch.setattr(backend(), "is_out_of_memory", lambda error: "much" in str(error))
    with pytest.raises(MemoryError, match="for 2 of 10x14 at once; draw fewer, or smaller ones"):
        small.generate(PROMPT, batch_size=2, num_steps=1)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_exception_in_the_callback_cancels(small, monkeypatch, capsys, ahead):
    monkeypatch.setattr("stable_diffusion_tf.pipeline.runs_ahead", lambda: ahead)

    class Enough(Exception):
        pass

    def stop(step, total, preview):
        if step == 2:
            raise Enough

    seen = []
    networks = small._networks
    original = networks._denoise
    monkeypatch.setitem(
        networks.__dict__, "_denoise", lambda x, *args: seen.append(x) or original(x, *args)
    )
    with pytest.raises(Enough):
        small.generate(PROMPT, num_steps=5, callback=stop)
    assert len(seen) == 2 + ahead
    shown = capsys.readouterr().err
    assert "2/5" in shown and "Decoding" not in shown
    assert latents(small, PROMPT, num_steps=2).shape == (1, 7, 5, 4)


def test_the_embedded_models_previews_resemble_its_pictures():
    sd = StableDiffusion.from_pretrained("emoji")
    previews = []
    (picture,) = sd.generate(
        "blue heart, fluent style",
        num_steps=8,
        seed=0,
        callback=lambda step, total, preview: previews.append(preview[0] / 255),
        progress=False,
    )
    height, width, _ = previews[-1].shape
    small = resize(picture / np.float32(255), height, width)
    assert np.sqrt(((previews[-1] - small) ** 2).mean()) < 0.2
    assert np.corrcoef(previews[-1].ravel(), small.ravel())[0, 1] > 0.8


def test_threads_share_a_model(tiny_model, photo):
    """At first use, at once: they load and build the same things."""
    tasks = [
        {"prompt": "a red apple"},
        {"prompt": "a blue cat", "clip_skip": 2},
        {"prompt": "a house", "input_image": photo},
        *({"prompt": "a pear", "reuse": n} for n in (2, 3)),
        {"prompt": "a leaf", "callback": lambda step, total, preview: np.asarray(preview)},
    ]
    settings = {"num_steps": 3, "output": "float", "progress": False}
    sizes = {"img_height": 14, "img_width": 10}
    alone = StableDiffusion.from_pretrained(tiny_model, **sizes)
    expected = [alone.generate(**task, seed=i, **settings) for i, task in enumerate(tasks)]

    shared = StableDiffusion.from_pretrained(tiny_model, **sizes)
    loaded, load, start = [], shared._networks._load, threading.Barrier(len(tasks))

    def slow_load(parts):
        loaded.extend(parts)
        time.sleep(0.05)  # for the others to come
        return load(parts)

    def draw(i):
        start.wait()
        return shared.generate(**tasks[i], seed=i, **settings), shared.last_seed

    shared._networks._load = slow_load
    with ThreadPoolExecutor(len(tasks)) as pool:
        found = [*pool.map(draw, range(len(tasks)))]
    assert sorted(loaded) == ["decoder", "encoder", "text_encoder", "unet"]
    for i, (pictures, seed) in enumerate(found):
        assert seed == i
        np.testing.assert_array_equal(pictures, expected[i])
    assert shared.last_seed is None


NAN = float("nan")
WHITE = np.ones((2, 3, 3))
PAIR = {"input_image": WHITE, "input_mask": WHITE}
WRONG = [
    ((7,), {}, TypeError, "prompt must be text or a list of texts, not 7"),
    (([PROMPT, None],), {}, TypeError, "prompt must be text or a list of texts"),
    (([],), {}, ValueError, "prompt is an empty list"),
    (("caf\udce9",), {}, ValueError, r"^prompt: not valid text, 'caf\\udce9'"),
    ((PROMPT, "caf\udce9"), {}, ValueError, "negative_prompt: not valid text"),
    ((None,), {}, ValueError, "give prompt or context, one of them"),
    ((PROMPT,), {"context": np.zeros((77, 32))}, ValueError, "one of them and not both"),
    (("(cat:101)",), {}, ValueError, "^prompt: 'cat' has the weight 101; weights go from -100"),
    ((["a", "(cat:101)"],), {}, ValueError, r"^prompt\[1\]: 'cat' has the weight 101"),
    ((PROMPT, "(cat:101)"), {}, ValueError, "^negative_prompt: 'cat' has the weight 101"),
    ((PROMPT, 7), {}, TypeError, "negative_prompt must be text"),
    ((PROMPT, "a"), {"negative_context": np.zeros((77, 32))}, ValueError, "negative_prompt or"),
    ((PROMPT, ["a", "b"]), {}, ValueError, "2 negative prompts or contexts for 1 pictures"),
    ((["a", "b", "c"],), {"batch_size": 2}, ValueError, "batch_size 2 does not fit 3 prompts"),
    ((PROMPT,), {"batch_size": 0}, ValueError, "batch_size must be a whole number, 1 or more"),
    ((PROMPT,), {"batch_size": 1.0}, ValueError, "batch_size must be"),
    ((PROMPT,), {"num_steps": 0}, ValueError, "num_steps must be a whole number from 1 to 499"),
    ((PROMPT,), {"num_steps": 500}, ValueError, "from 1 to 499"),
    ((PROMPT,), {"num_steps": True}, ValueError, "num_steps must be .*, not True"),
    ((PROMPT,), {"num_steps": 2.5}, ValueError, "num_steps must be a whole number"),
    ((PROMPT,), {"unconditional_guidance_scale": NAN}, ValueError, "scale must be finite, not nan"),
    ((PROMPT,), {"unconditional_guidance_scale": "7"}, TypeError, "scale must be a number"),
    ((PROMPT,), {"unconditional_guidance_scale": 10**400}, ValueError, "must be at most 3.4e\\+38"),
    ((PROMPT,), {"unconditional_guidance_scale": 1e39}, ValueError, "at most 3.4e\\+38, float32"),
    ((PROMPT,), {"temperature": NAN}, ValueError, "temperature must be finite"),
    ((PROMPT,), {"temperature": -1}, ValueError, "temperature must be a number, 0 or more"),
    ((PROMPT,), {"eta": NAN}, ValueError, "eta must be finite"),
    ((PROMPT,), {"eta": 2}, ValueError, "eta must be from 0"),
    ((PROMPT,), {"schedule": "karras"}, ValueError, "'karras' does not apply"),
    ((PROMPT,), {"schedule": "even", "sampler": "euler"}, ValueError, "unknown schedule 'even'"),
    ((PROMPT,), {"num_steps": 51, "sampler": "lcm"}, ValueError, "num_steps must .* 1 to 50"),
    ((PROMPT,), {"eta": 0.5, "sampler": "euler"}, ValueError, "samplers with one: ddim"),
    ((PROMPT,), {"guidance_rescale": NAN}, ValueError, "guidance_rescale must be finite"),
    (
        (PROMPT,),
        {"guidance_rescale": 0.5, "unconditional_guidance_scale": 1},
        ValueError,
        "guidance_rescale tempers guidance, and there is none: with it, .* over 1, not 1;",
    ),
    ((PROMPT,), {"guidance_rescale": 1.5}, ValueError, "guidance_rescale must be from 0 to 1"),
    ((PROMPT,), {"sampler": "plms"}, ValueError, "unknown sampler 'plms'; here it is pndm"),
    ((PROMPT,), {"output": "pil"}, ValueError, "unknown output 'pil'; known: image, float"),
    ((PROMPT,), {"seed": -2}, ValueError, "seed must be a whole number from 0"),
    ((PROMPT,), {"seed": "1"}, ValueError, "seed must be a whole number from 0"),
    ((PROMPT,), {"seed": 2**64 - 1, "batch_size": 2}, ValueError, "seed must be"),
    ((PROMPT,), {"seed": [1, 2]}, ValueError, "2 seeds for 1 pictures"),
    ((PROMPT,), {"batch_size": 2**18}, ValueError, "a batch of 262144 at 10x14 is over 33,554,432"),
    ((PROMPT,), {"rng": "cuda"}, ValueError, "unknown rng 'cuda'; known: numpy, torch"),
    ((PROMPT,), {"clip_skip": 0}, ValueError, "clip_skip must be a whole number from 1 to 3"),
    ((PROMPT,), {"clip_skip": 4}, ValueError, "clip_skip must be .* not 4"),
    ((PROMPT,), {"reuse": 0}, ValueError, "reuse must be a whole number, 1 or more: .* not 0"),
    ((PROMPT,), {"reuse": 2.0}, ValueError, "reuse must be a whole number"),
    ((None,), {"context": np.zeros((77, 16))}, ValueError, r"context .* \(N, 32\) or \(n, N, 32"),
    ((None,), {"context": np.zeros((78, 32))}, ValueError, "a multiple of 77 of them, not 78"),
    ((None,), {"context": np.zeros((0, 77, 32))}, ValueError, r"not \(0, 77, 32\)"),
    ((None,), {"context": "a"}, TypeError, "context must be an array of numbers, not 'a'"),
    ((None,), {"context": np.full((77, 32), NAN)}, ValueError, "context has NaN"),
    ((PROMPT,), {"negative_context": np.zeros(32)}, ValueError, "negative_context must have"),
    ((PROMPT,), {"diffusion_noise": np.zeros((1, 5, 7, 4))}, ValueError, r"\(1, 7, 5, 4\), not"),
    ((PROMPT,), {"input_image": "cat.png"}, FileNotFoundError, "cat.png"),
    ((PROMPT,), {"input_image": []}, ValueError, "input_image is an empty list"),
    ((PROMPT,), {"input_image": 7}, TypeError, "input_image: A picture is a path"),
    ((PROMPT,), {"input_image": WHITE * 2}, ValueError, r"input_image: .* lies in \[0, 1\]"),
    ((PROMPT,), {"input_image": [WHITE, WHITE * 2]}, ValueError, r"^input_image\[1\]: "),
    ((["a"] * 3,), {"input_image": [WHITE] * 2}, ValueError, "2 input images for 3 pictures"),
    (([PROMPT] * 2,), {"input_image": [WHITE] * 3}, ValueError, "2 prompts or contexts for 3"),
    ((PROMPT,), {"input_mask": WHITE}, ValueError, "input_mask says where .* input_image; give"),
    ((PROMPT,), {**PAIR, "input_mask": WHITE - 2}, ValueError, r"input_mask: .*\[-1, -1\]"),
    ((PROMPT,), {**PAIR, "input_mask": WHITE / 255}, ValueError, "input_mask: .* brightest"),
    ((PROMPT,), {"sample_posterior": True}, ValueError, "posterior of input_image; give that too"),
    ((PROMPT,), {"mask_feather": 2}, ValueError, "mask_feather softens .* input_mask; give that"),
    (
        (PROMPT,),
        {**PAIR, "mask_feather": -1},
        ValueError,
        "mask_feather must be from 0 to 14 p",
    ),
    ((PROMPT,), {**PAIR, "mask_feather": 1e30}, ValueError, "from 0 to 14 pixels, not 1e[+]30"),
    ((PROMPT,), {**PAIR, "input_mask": 0 * WHITE}, ValueError, "^input_mask repaints nothing: of"),
    ((PROMPT,), {**PAIR, "mask_feather": NAN}, ValueError, "mask_feather must be finite"),
    ((PROMPT,), {"input_image_strength": 0}, ValueError, "strength must be over 0, up to 1, not"),
    ((PROMPT,), {"input_image_strength": 1.01}, ValueError, "input_image_strength must be over 0"),
    ((PROMPT,), {"input_image_strength": NAN}, ValueError, "input_image_strength must be finite"),
    ((PROMPT,), {"callback": 7}, TypeError, "callback must be a function or None, not 7"),
    ((PROMPT,), {**PAIR, "seed": -2}, ValueError, "seed must be a whole number from 0"),
]


@pytest.mark.parametrize(("args", "settings", "error", "message"), WRONG)
def test_wrong_input_is_refused_before_any_work(tiny_model, args, settings, error, message):
    sd = StableDiffusion.from_pretrained(tiny_model, img_height=14, img_width=10)
    sd._networks._load = None  # raises TypeError when it is called
    with pytest.raises(error, match=message):
        sd.generate(*args, **settings)
    assert sd.last_seed is None


def test_every_parameter_with_a_range_has_a_wrong_value_above():
    parameters = signature(StableDiffusion.generate).parameters
    ranged = [
        name
        for name, parameter in parameters.items()
        if name != "self" and not re.search("bool|Callable", str(parameter.annotation))
    ]
    positional = [name for args, *_ in WRONG for name in ranged[: len(args)]]
    assert set(ranged) <= {*positional, *(name for _, settings, *_ in WRONG for name in settings)}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"img_height": 33}, ValueError, "img_height must be a multiple of 2 .*not 33.* 32 or 34"),
        ({"img_width": 0}, ValueError, "img_width must be a multiple of 2"),
        ({"img_width": 2**21}, ValueError, "a batch of 1 at 2097152x32 is over 33,554,432 pixels"),
        ({"img_width": 32.0}, TypeError, "img_width must be a whole number of pixels, not 32.0"),
        ({"dtype": "float8"}, ValueError, "unknown dtype 'float8'; known: float32, float16"),
    ],
)
def test_a_model_is_opened_with_what_fits_it(tiny_model, settings, error, message):
    with pytest.raises(error, match=message):
        StableDiffusion.from_pretrained(tiny_model, **settings)


def test_a_backend_that_is_not_supported_is_refused_on_opening(tiny_model, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match=r"'torch' is not supported.*to tensorflow or jax"):
        StableDiffusion.from_pretrained(tiny_model)


def test_what_is_saved_opens_again(tmp_path, small, tiny_model):
    small.save_pretrained(tmp_path / "saved")
    again = StableDiffusion.from_pretrained(tmp_path / "saved", img_height=14, img_width=10)
    assert again.config == small.config
    settings = {"num_steps": 1, "seed": 0}
    np.testing.assert_array_equal(
        latents(again, PROMPT, **settings), latents(small, PROMPT, **settings)
    )
    with pytest.raises(FileExistsError, match="saved exists"):
        StableDiffusion.from_pretrained(tiny_model).save_pretrained(tmp_path / "saved")


def test_unknown_weights_are_refused_with_the_known():
    with pytest.raises(CheckpointError, match=r"Unknown weights 'emojis'.*preset \(emoji, sd-"):
        StableDiffusion.from_pretrained("emojis")


def test_tensors_that_do_not_fit_are_all_found_before_the_work(tiny_folder, tiny_weights, capsys):
    tensors = dict(tiny_weights["vae"])
    del tensors["decoder.conv_in.bias"]
    save_safetensors(tensors, tiny_folder / FILES["vae"])
    tensors = {**tiny_weights["unet"], "surprise": np.zeros(1, np.float32)}
    save_safetensors(tensors, tiny_folder / FILES["unet"])
    sd = StableDiffusion.from_pretrained(tiny_folder)
    with pytest.raises(CheckpointError) as caught:
        sd.generate(PROMPT)
    for expected in ("not part of the model: surprise", "missing: decoder.conv_in.bias"):
        assert expected in str(caught.value)
    assert "Denoising" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((6, 8, 2)), ValueError, r"\(6, 8, 2\)"),
        ("cat.png", FileNotFoundError, "cat.png"),
        ([], ValueError, "images is an empty list; give at least one picture$"),
        ([np.zeros((6, 8, 3)), np.zeros((8, 6, 3))], ValueError, "all of one size"),
        (np.zeros((1, 6, 7, 3)), ValueError, "images' width must be a multiple of 2"),
        (np.full((1, 6, 8, 3), 2.0), ValueError, r"^images: .* lies in \[0, 1\]"),
        ([np.zeros((6, 8, 3)), np.zeros((6, 8, 3), int)], ValueError, r"^images\[1\]: .* not int"),
    ],
)
def test_wrong_images_are_refused(small, images, error, message):
    with pytest.raises(error, match=message):
        small.encode_image(images)


def test_a_size_that_is_set_is_checked_too(tiny_model):
    sd = StableDiffusion.from_pretrained(tiny_model)
    sd.img_height = 33
    with pytest.raises(ValueError, match="img_height must be a multiple of 2"):
        sd.generate(PROMPT)
    sd.img_height = 16
    assert latents(sd, PROMPT, num_steps=1).shape == (1, 8, 16, 4)


def test_a_size_that_another_thread_sets_is_for_the_next_picture(tiny_model, monkeypatch):
    sd = StableDiffusion.from_pretrained(tiny_model)
    check = arguments.check_clip_skip

    def meanwhile(*args):
        sd.img_width = 16
        return check(*args)

    monkeypatch.setattr(arguments, "check_clip_skip", meanwhile)
    settings = {"num_steps": 1, "input_image": WHITE, "input_mask": WHITE, "progress": False}
    shapes = [sd.generate(PROMPT, **settings).shape for _ in range(2)]
    assert shapes == [(1, 32, 32, 3), (1, 32, 16, 3)]


@pytest.mark.parametrize(
    ("height", "width", "warns"),
    [(16, 16, True), (16, 18, False), (64, 16, False), (64, 62, False), (64, 64, True)],
)
def test_sizes_far_from_those_of_training_are_warned_of(tiny_model, caplog, height, width, warns):
    sd = StableDiffusion.from_pretrained(tiny_model)
    sd.img_height, sd.img_width = height, width
    sd.encode_image(np.zeros((1, 8, 8, 3)))
    latents(sd, PROMPT, num_steps=1, input_image=np.zeros((8, 8, 3)))
    assert caplog.messages == []
    latents(sd, PROMPT, num_steps=1)
    warning = f"tiny has learnt to draw at 32x32; at {width}x{height}, pictures may make no sense"
    assert caplog.messages == [warning] * warns


@pytest.mark.parametrize("dtype", ["float32", "float16", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("processor", [True, False])
def test_what_is_for_gpus_is_warned_of_on_a_processor(
    tiny_model, monkeypatch, caplog, dtype, processor
):
    monkeypatch.setattr("stable_diffusion_tf.pipeline.uses_onednn", lambda: processor)
    StableDiffusion.from_pretrained(tiny_model, dtype=dtype)
    warned = processor and dtype in ("float16", "mixed_float16")
    assert [message.startswith(f"{dtype} is for GPUs: ") for message in caplog.messages] == (
        [True] * warned
    )


@pytest.mark.parametrize("download_weights", [False, True])
def test_the_global_dtype_policy_is_that_of_the_moment_of_making(
    monkeypatch, caplog, download_weights
):
    monkeypatch.setattr("stable_diffusion_tf.pipeline.uses_onednn", lambda: True)
    monkeypatch.setattr(
        "stable_diffusion_tf.pipeline.build_part", lambda config, part, dtype: dtype
    )
    monkeypatch.setattr(
        "stable_diffusion_tf.pipeline.load_parts",
        lambda checkpoint, parts, dtype=None: dict.fromkeys(parts, dtype),
    )
    policy = keras.DTypePolicy("mixed_float16")
    with monkeypatch.context() as then:
        then.setattr(keras.config, "dtype_policy", lambda: policy)
        sd = StableDiffusion(download_weights=download_weights)
    assert sd.diffusion_model is policy  # itself: its name alone may not make it again
    (message,) = caplog.messages
    assert message.startswith("mixed_float16 is for GPUs: ")


def test_wrong_noise_of_the_posterior_is_refused(small):
    with pytest.raises(ValueError, match=r"noise must have the shape \(1, 3, 4, 4\)"):
        small.encode_image(np.zeros((1, 6, 8, 3)), np.zeros((1, 4, 3, 4)))


def test_wrong_latents_are_refused(small):
    with pytest.raises(ValueError, match=r"latents must have the shape \(B, h, w, 4\)"):
        small.decode(np.zeros((7, 5, 4)))


def test_an_inpainting_model_wants_a_mask(inpainting, photo):
    for settings in ({}, {"input_image": photo}):
        with pytest.raises(ValueError, match="inpainting model: give input_image and input_mask"):
            inpainting.generate(PROMPT, **settings)


class TestTheEarlierPortsConstructor:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        published = replace(PRESETS[STABLE_DIFFUSION], config=TINY)
        monkeypatch.setitem(PRESETS, STABLE_DIFFUSION, published)

    def test_random_weights(self):
        sd = StableDiffusion(32, 48, download_weights=False)
        assert sd.generate(PROMPT, num_steps=1, progress=False).shape == (1, 32, 48, 3)
        assert isinstance(sd.image_encoder, keras.Model)

    def test_published_weights_are_asked_for_at_first_use_only(self, hub):
        sd = StableDiffusion(32, 48)
        assert hub.requests == []
        with pytest.raises(DownloadError, match=r"decoder\.h5 cannot be fetched"):
            sd.decode(np.zeros((1, 16, 24, 4)))
        asked = [path for _, path, _ in hub.requests if path.endswith(".h5")]
        assert {path.rpartition("/")[2] for path in asked} == {"decoder.h5"}

    def test_published_weights_are_fetched_by_network(
        self, tmp_path, hub, tiny_model, tiny_weights, monkeypatch
    ):
        paths = layouts.write_keras(tmp_path / "h5", tiny_weights, functional=False)
        published = {f"{part}.h5": path.read_bytes() for part, path in paths.items()}
        hub.repositories["someone/keras"] = published
        files = {part: HubFile("someone/keras", f"{part}.h5") for part in paths}
        preset = replace(PRESETS[STABLE_DIFFUSION], files=files)
        monkeypatch.setitem(PRESETS, STABLE_DIFFUSION, preset)

        sd, local = StableDiffusion(32, 32), StableDiffusion.from_pretrained(tiny_model)
        context = sd.encode_text(PROMPT)
        assert hub.downloads() == ["text_encoder.h5"]
        settings = {"context": context, "unconditional_guidance_scale": 1, "output": "latents"}
        sd.generate(None, num_steps=1, progress=False, **settings)
        assert hub.downloads() == ["text_encoder.h5", "unet.h5"]
        drawn = sd.generate(PROMPT, num_steps=1, seed=0, progress=False)
        assert hub.downloads() == ["text_encoder.h5", "unet.h5", "decoder.h5"]
        expected = local.generate(PROMPT, num_steps=1, seed=0, progress=False)
        np.testing.assert_array_equal(drawn, expected)

    def test_it_opens_no_model(self):
        with pytest.raises(TypeError, match=r"StableDiffusion.from_pretrained\(.emoji.\)"):
            StableDiffusion("emoji")

    @pytest.mark.parametrize(
        ("args", "message"),
        [((33,), "img_height must be a multiple"), ((32, 32, 64), "max_text_len must be 77")],
    )
    def test_wrong_sizes(self, args, message):
        with pytest.raises(ValueError, match=message):
            StableDiffusion(*args)


def test_the_published_model_has_the_published_size():
    sd = StableDiffusion()
    assert (sd.img_height, sd.img_width) == (512, 512)
    assert sd.config.unet == UNetConfig()
