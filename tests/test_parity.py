"""Whole pipelines against the reference's own, live."""

import importlib
from dataclasses import replace

import keras
import numpy as np
import pytest
import synth
from tiny import TINY

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part
from stable_diffusion_tf.checkpoints.save import save
from stable_diffusion_tf.config import AutoencoderConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs
]

# The published factor of 8, with which the reference's multiples of 8 make odd latents.
CONFIG = replace(TINY, autoencoder=AutoencoderConfig(widths=(32, 32, 32, 64), resnets=1))
PROMPTS = ["a red apple", "a cat, blob style", ""]


def saved(folder, config):
    keras.utils.set_random_seed(0)
    parts = {part: build_part(config, part) for part in MODELS}
    save(Models(config, **parts), folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("parity") / "tiny", CONFIG)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    config = replace(CONFIG, unet=replace(CONFIG.unet, in_channels=9))
    return saved(tmp_path_factory.mktemp("parity") / "inpainting", config)


def opened(folder, name):
    import diffusers
    import torch

    torch.set_num_threads(1)  # for so small a model, more only wait for each other
    pipeline = getattr(diffusers, name).from_pretrained(
        folder, tokenizer=None, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(folder):
    return opened(folder, "StableDiffusionPipeline")


def scheduler(sampler, folder):
    import diffusers

    eulers = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    }
    if sampler in eulers:
        return eulers[sampler].from_pretrained(
            folder, subfolder="scheduler", timestep_spacing="linspace"
        )
    return diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


@pytest.mark.parametrize(
    ("sampler", "num_steps", "prompts", "size", "guidance", "rescale"),
    [
        ("ddim", 1, PROMPTS[:1], (32, 32), 7.5, 0.0),
        ("ddim", 2, PROMPTS[:1], (40, 24), 7.5, 0.0),
        ("ddim", 50, PROMPTS[:1], (32, 32), 3.0, 0.0),
        ("ddim", 10, PROMPTS, (24, 56), 7.5, 0.7),
        ("ddim", 10, PROMPTS[:1], (32, 32), 1.0, 0.0),
        ("euler", 2, PROMPTS[:1], (32, 32), 7.5, 0.0),
        ("euler", 50, PROMPTS, (40, 24), 3.0, 0.0),
    ],
)
def test_latents_are_theirs(folder, theirs, sampler, num_steps, prompts, size, guidance, rescale):
    import torch

    height, width = size
    sd = StableDiffusion.from_pretrained(folder, img_height=height, img_width=width)
    noise = synth.inputs("parity", (len(prompts), height // 8, width // 8, 4))
    theirs.scheduler = scheduler(sampler, folder)

    def read(texts):
        ids = torch.tensor(sd.tokenizer.tokenize(texts))
        return theirs.text_encoder(ids).last_hidden_state

    ours = sd.generate(
        prompts,
        "blue",
        num_steps=num_steps,
        unconditional_guidance_scale=guidance,
        sampler=sampler,
        guidance_rescale=rescale,
        diffusion_noise=noise,
        output="latents",
        progress=False,
    )
    with torch.no_grad():
        reference = theirs(
            prompt_embeds=read(prompts),
            negative_prompt_embeds=read(["blue"] * len(prompts)),
            height=height,
            width=width,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            output_type="latent",
        ).images
    assert synth.relative_error(ours, reference.numpy().transpose(0, 2, 3, 1)) <= 2e-5


@pytest.mark.parametrize(
    ("task", "sampler", "num_steps", "strength", "batch", "size"),
    [
        ("img2img", "ddim", 50, 0.02, 1, (32, 32)),
        ("img2img", "ddim", 10, 1.0, 3, (40, 24)),
        ("img2img", "ddim", 2, 0.5, 1, (24, 56)),
        ("img2img", "euler", 20, 0.73, 1, (32, 32)),
        ("inpaint", "ddim", 1, 1.0, 1, (32, 32)),
        ("inpaint", "ddim", 50, 0.29, 1, (40, 24)),
        ("inpaint", "euler", 10, 1.0, 3, (24, 56)),
        ("inpaint", "euler", 10, 0.5, 1, (32, 32)),
        ("inpaint9", "ddim", 10, 1.0, 3, (40, 24)),
        ("inpaint9", "ddim", 10, 0.5, 1, (32, 32)),
    ],
)
def test_drawing_over_pictures_is_theirs(
    folder, inpainting, monkeypatch, task, sampler, num_steps, strength, batch, size
):
    import torch

    def channels_first(array):
        return torch.tensor(np.moveaxis(array, -1, 1))

    height, width = size
    folder = inpainting if task == "inpaint9" else folder
    sd = StableDiffusion.from_pretrained(folder, img_height=height, img_width=width)
    rng = np.random.default_rng(0)
    image = rng.random((batch, height, width, 3), dtype=np.float32)
    mask = np.zeros((batch, height, width, 1), np.float32)
    mask[:, 5:21, 7:] = 1  # cuts through latents
    noise = rng.standard_normal((batch, height // 8, width // 8, 4), dtype=np.float32)
    masks = {} if task == "img2img" else {"input_mask": mask}
    ours = sd.generate(
        PROMPTS[:batch],
        "blue",
        num_steps=num_steps,
        unconditional_guidance_scale=5,
        sampler=sampler,
        input_image=image,
        input_image_strength=strength,
        diffusion_noise=noise,
        output="latents",
        progress=False,
        **masks,
    )

    name = task.removesuffix("9")
    class_name = {"img2img": "Img2Img", "inpaint": "Inpaint"}[name]
    theirs = opened(folder, f"StableDiffusion{class_name}Pipeline")
    theirs.scheduler = scheduler(sampler, folder)
    module = importlib.import_module(type(theirs).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: channels_first(noise))
    monkeypatch.setattr(module, "retrieve_latents", lambda out, **kwargs: out.latent_dist.mode())

    def read(texts):
        return torch.tensor(sd.encode_text(texts))

    masks = {}
    if task != "img2img":
        masks = {"mask_image": channels_first(mask), "height": height, "width": width}
    with torch.no_grad():
        reference = theirs(
            prompt_embeds=read(PROMPTS[:batch]),
            negative_prompt_embeds=read(["blue"] * batch),
            image=channels_first(image),
            strength=strength,
            num_inference_steps=num_steps,
            guidance_scale=5,
            output_type="latent",
            **masks,
        ).images
    assert synth.relative_error(ours, np.moveaxis(reference.numpy(), 1, -1)) <= 2e-5


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("euler_ancestral", 0.0)])
def test_a_torch_seed_draws_their_latents(folder, theirs, sampler, eta):
    import torch

    sd = StableDiffusion.from_pretrained(folder, img_height=40, img_width=24)
    theirs.scheduler = scheduler(sampler, folder)
    states = sd.encode_text(PROMPTS)
    ours = sd.generate(
        None,
        num_steps=5,
        unconditional_guidance_scale=1,
        seed=[7, 8, 2**40],
        rng="torch",
        sampler=sampler,
        eta=eta,
        context=states,
        output="latents",
        progress=False,
    )
    with torch.no_grad():
        reference = theirs(
            prompt_embeds=torch.tensor(states),
            height=40,
            width=24,
            num_inference_steps=5,
            guidance_scale=1,
            eta=eta,
            generator=[torch.Generator().manual_seed(seed) for seed in (7, 8, 2**40)],
            output_type="latent",
        ).images
    assert synth.relative_error(ours, reference.numpy().transpose(0, 2, 3, 1)) <= 2e-5


def test_their_clip_skip_counts_from_nought(folder, theirs, monkeypatch):
    from transformers import CLIPTokenizer

    theirs.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = theirs.text_encoder
    if not hasattr(encoder, "text_model"):  # which transformers 5 took away from diffusers 0.42
        monkeypatch.setitem(vars(encoder), "text_model", encoder)
    sd = StableDiffusion.from_pretrained(folder)
    for skipped in (None, 1, 2):
        found = sd.encode_text(PROMPTS, clip_skip=1 + (skipped or 0))
        reference, _ = theirs.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=skipped)
        assert synth.relative_error(found, reference.detach().numpy()) <= 2e-5
