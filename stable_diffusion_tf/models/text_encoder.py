"""CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020)."""

import keras
from keras import layers, ops

from stable_diffusion_tf.config import TextEncoderConfig
from stable_diffusion_tf.models.base import Network, building
from stable_diffusion_tf.models.layers import (
    DotProductAttention,
    dense,
    gelu,
    layer_norm,
    quick_gelu,
)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Embedding(layers.Embedding):  # by which name Keras saves it
    """Keras's, whose vectors are cast after they are looked up, not the whole table before.

    So the gradients of a token that a batch has often, such as the padding, add up in float32.
    """

    def add_weight(self, *args, **kwargs):
        return super().add_weight(*args, autocast=False, **kwargs)


class PositionEmbedding(layers.Layer):
    """Adds a learned vector to each position of (B, N, width), N up to `length`."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def build(self, input_shape):
        shape = (self.length, input_shape[-1])
        self.embeddings = self.add_weight(shape=shape, initializer="normal", name="embeddings")

    def call(self, x):
        return x + self.embeddings[: ops.shape(x)[1]]

    def compute_output_shape(self, input_shape):
        return input_shape


class TextEncoder(Network):
    """token_ids (B, N <= 77) int -> (B, N, width), the last layer's states after the final norm.

    Args:
        config: the sizes; `config.SD_1.text_encoder` and `config.SD_2.text_encoder` are CLIP
            ViT-L/14 and all but the last layer of OpenCLIP ViT-H/14.
        dtype: Keras dtype policy of the layers, such as "float32" or "mixed_bfloat16".
    """

    Config = TextEncoderConfig

    def __init__(self, config: TextEncoderConfig, dtype=None, name="text_encoder"):
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        with building(dtype):
            x = Embedding(config.vocab_size, config.width, name="embeddings.token_embedding")(
                token_ids
            )
            x = PositionEmbedding(config.max_length, name="embeddings.position_embedding")(x)
            hidden_states = []
            for i in range(config.layers):
                x = transformer_layer(x, config, f"encoder.layers.{i}")
                hidden_states.append(x)
            x = layer_norm(x, "final_layer_norm")
            super().__init__(token_ids, x, config, name)
        self.hidden_states = hidden_states

    def skipping(self, clip_skip: int) -> keras.Model:
        """The encoder that ends early: of these layers and weights, none of them copied.

        Args:
            clip_skip: 1 is the whole encoder, 2 goes from the layer before the last straight to
                the final norm, and so on, to `config.layers`.
        """
        states = self.get_layer("final_layer_norm")(self.hidden_states[-clip_skip])
        return self.derived(self.inputs[0], states)


def transformer_layer(x, config, name):
    h = layer_norm(x, f"{name}.layer_norm1")
    q, k, v = (dense(h, config.width, f"{name}.self_attn.{part}_proj") for part in "qkv")
    h = DotProductAttention(config.heads, causal=True)(q, k, v)
    x = x + dense(h, config.width, f"{name}.self_attn.out_proj")

    h = layer_norm(x, f"{name}.layer_norm2")
    h = ACTIVATIONS[config.activation](dense(h, config.mlp_width, f"{name}.mlp.fc1"))
    return x + dense(h, config.width, f"{name}.mlp.fc2")
