"""What LoRA trains, and that it is drawn with and saved as a part of the kernels."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import ops
from small import UNET
from tiny import TINY

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part, load
from stable_diffusion_tf.checkpoints.save import save
from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.training.lora import enable_lora

SMALL = replace(TINY, unet=UNET)
RNG = np.random.default_rng(0)
INPUTS = [
    RNG.standard_normal((2, 4, 4, 4), np.float32),
    np.array([981.0, 1.0], np.float32),
    RNG.standard_normal((2, 5, 32), np.float32),
]


def build(dtype="float32"):
    keras.utils.set_random_seed(0)
    return Models(SMALL, **{part: build_part(SMALL, part, dtype) for part in MODELS})


def outputs(network, inputs=INPUTS):
    return ops.convert_to_numpy(ops.cast(network(inputs), "float32"))


def test_the_projections_additions_alone_are_trained_and_are_0_at_first():
    unet = build().unet
    before = outputs(unet)
    enable_lora(unet, rank=3)
    np.testing.assert_array_equal(outputs(unet), before)
    trained = unet.trainable_variables
    assert {v.name for v in trained} == {"lora_kernel_a", "lora_kernel_b"}
    blocks, projections, matrices = 4, 2 * 4, 2  # every width is 32
    assert [v.shape for v in trained[:2]] == [(32, 3), (3, 32)]
    assert len(trained) == blocks * projections * matrices
    assert len(trained) + len(unet.non_trainable_variables) == len(unet.variables)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4", None])
def test_a_wrong_rank_changes_nothing(rank):
    unet = build().unet
    with pytest.raises(ValueError, match=f"rank must be a whole number, 1 or more, not {rank!r}"):
        enable_lora(unet, rank)
    enable_lora(unet, 2)
    with pytest.raises(ValueError, match="diffusion_model has LoRA already; load it again"):
        enable_lora(unet, 2)


def test_what_has_no_projections_is_left_as_it_is():
    decoder = build().decoder
    with pytest.raises(ValueError, match="decoder has no attentions' projections to add to"):
        enable_lora(decoder, 2)
    assert decoder.trainable_variables


def test_what_is_trained_is_saved_and_drawn_again(tmp_path):
    models = build()
    before = outputs(models.unet)
    enable_lora(models.unet, rank=2)
    step = training_step(
        lambda *inputs: ops.mean(ops.square(models.unet(list(inputs)))),
        models.unet.trainable_variables,
        keras.optimizers.Adam(0.1),
        frozen=models.unet.non_trainable_variables,
    )
    losses = [float(step(*INPUTS)) for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]
    save(models, tmp_path / "saved")
    after = outputs(load(tmp_path / "saved").unet)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, outputs(models.unet), atol=1e-5)


def test_what_has_drawn_before_draws_with_it():
    models = build()
    settings = {"seed": 0, "num_steps": 2, "output": "latents", "progress": False}
    drawn = [(sd := StableDiffusion.from_models(models)).generate("a cat", **settings)]
    enable_lora(models.unet, rank=2)
    drawn += [sd.generate("a cat", **settings)]
    np.testing.assert_array_equal(drawn[1], drawn[0])
    for variable in models.unet.trainable_variables:
        variable.assign(variable + 0.3)
    for each in (sd, StableDiffusion.from_models(models)):
        drawn += [each.generate("a cat", **settings)]
    assert abs(drawn[2] - drawn[0]).max() > 0.01
    np.testing.assert_array_equal(drawn[2], drawn[3])


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("unet", "down_blocks.0.attentions.0.proj_in"),  # a convolution
        ("text_encoder", "embeddings.token_embedding"),
    ],
)
def test_a_sum_is_saved_in_float32_whatever_it_is_computed_in(tmp_path, part, layer):
    models = build("mixed_bfloat16")
    adapted = getattr(models, part).get_layer(layer)
    before = np.asarray(adapted.weights[0])
    adapted.enable_lora(2, lora_alpha=1)
    a, b = (weight for weight in adapted.weights if weight.name.startswith("lora_"))
    for matrix in (a, b):
        matrix.assign(RNG.standard_normal(matrix.shape, np.float32))
    save(models, tmp_path / "saved")
    found = getattr(load(tmp_path / "saved"), part).get_layer(layer).weights
    expected = before + 0.5 * np.asarray(a) @ np.asarray(b)
    np.testing.assert_allclose(np.asarray(found[0]), expected, atol=1e-5)
    for weight, other in zip(found[1:], adapted.weights[1:], strict=False):  # a bias
        np.testing.assert_array_equal(weight, other)


def test_a_step_reads_what_is_frozen_as_it_is_then():
    weight, frozen = keras.Variable(1.0), keras.Variable(2.0, trainable=False)
    step = training_step(
        lambda x: weight * frozen * x, [weight], keras.optimizers.SGD(0.0), frozen=[frozen]
    )
    assert float(step(np.float32(5))) == 10
    frozen.assign(3.0)
    assert float(step(np.float32(5))) == 15
