"""Text to latents against the reference's own pipeline, live."""

from dataclasses import replace

import keras
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    parts = {part: build_part(CONFIG, part) for part in MODELS}
    save(Models(CONFIG, **parts), folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    import diffusers
    import torch

    torch.set_num_threads(1)  # for so small a model, more only wait for each other
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
