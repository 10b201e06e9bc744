"""Keras's own saving of the four networks."""

from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from tiny import TINY

from stable_diffusion_tf.checkpoints.load import MODELS, build_part

# Keras's, which asks TensorFlow's variables for an array as NumPy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RNG = np.random.default_rng(0)
INPUTS = {
    "text_encoder": np.array([[49406, 320, 736, 49407]], np.int32),
    "unet": [
        RNG.standard_normal((1, 4, 4, 4), np.float32),
        np.array([981.0], np.float32),
        RNG.standard_normal((1, 5, 32), np.float32),
    ],
    "encoder": RNG.standard_normal((1, 8, 8, 3), np.float32),
    "decoder": RNG.standard_normal((1, 4, 4, 4), np.float32),
}


def outputs(part, model):
    return ops.convert_to_numpy(ops.cast(model(INPUTS[part]), "float32"))


MAP = keras.dtype_policies.DTypePolicyMap("float32")
MAP["down_blocks.0.resnets.0.conv1"] = keras.dtype_policies.DTypePolicy("bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", MAP])
@pytest.mark.parametrize("part", MODELS)
def test_a_keras_file_is_read_again(tmp_path, part, dtype):
    model = build_part(TINY, part, dtype)
    model.layers[2].trainable = False
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")

    assert type(again) is type(model) and again.config == model.config
    assert [v.path for v in again.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    assert [(v.path, v.dtype) for v in again.variables] == [
        (v.path, v.dtype) for v in model.variables
    ]
    np.testing.assert_array_equal(outputs(part, again), outputs(part, model))


def test_a_model_of_the_same_layers_is_cloned_and_read_again(tmp_path):
    model = build_part(TINY, "unet")
    own = keras.Model(model.input, model.output)
    own.save(tmp_path / "model.keras")
    kinds = {type(layer).__name__: type(layer) for layer in model.layers}
    for again in (
        keras.models.clone_model(own),
        keras.models.load_model(tmp_path / "model.keras", custom_objects=kinds),
    ):
        again.set_weights(model.get_weights())
        np.testing.assert_array_equal(outputs("unet", again), outputs("unet", model))


@pytest.mark.parametrize("part", MODELS)
def test_a_config_makes_the_same_network_with_weights_of_its_own(part):
    model = build_part(TINY, part)
    other = type(model).from_config(model.get_config())
    assert other.config == model.config
    assert not np.allclose(outputs(part, other), outputs(part, model))
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(outputs(part, other), outputs(part, model))


def test_model_checkpoint_keeps_what_fit_trains(tmp_path):
    model = build_part(
        replace(TINY, autoencoder=replace(TINY.autoencoder, widths=(32,))), "decoder"
    )
    model.compile("sgd", "mse")
    latents = INPUTS["decoder"]
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss")
    model.fit(latents, np.zeros((1, 4, 4, 3)), callbacks=[checkpoint], verbose=0)
    again = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_array_equal(outputs("decoder", again), outputs("decoder", model))


def test_lora_is_kept_as_part_of_the_kernels(tmp_path):
    model = build_part(TINY, "unet")
    layer = model.get_layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs("unet", again), outputs("unet", model), atol=1e-5)


def test_the_token_table_is_saved_where_keras_has_its_own(tmp_path):
    build_part(TINY, "text_encoder", "float32").save_weights(tmp_path / "text.weights.h5")
    with h5py.File(tmp_path / "text.weights.h5") as file:
        assert "embedding" in file["layers"]
