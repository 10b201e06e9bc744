"""What the four networks have in common as Keras models: how Keras builds and saves them."""

from contextlib import contextmanager
from dataclasses import asdict

import keras
from keras.src.backend.common import global_state

SCOPES = "name_scope_stack"  # Keras's own name for them


@contextmanager
def building(dtype):
    """A network made inside has Keras's dtype policy `dtype` (None: the global one).

    Its variables' paths are those that files are read and written by, whatever name scope is open,
    as in a layer's `build`.
    """
    before = keras.config.dtype_policy()
    scopes = global_state.get_global_attribute(SCOPES)
    keras.config.set_dtype_policy(before if dtype is None else dtype)
    global_state.set_global_attribute(SCOPES, [])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
        global_state.set_global_attribute(SCOPES, scopes)


class Network(keras.Model):
    """A functional model whose layers are made by its constructor, `cls(config, dtype, name)`.

    Keras keeps the arguments and which layers are frozen, and calls the constructor again. What has
    LoRA is better saved by `checkpoints.save`: Keras rounds the sums to what layers compute in.

    Attributes:
        config: a `Config`.
        Config: of each network, the dataclass of `stable_diffusion_tf.config` that makes it.
    """

    Config: type

    def __init__(self, inputs, outputs, config, name):
        super().__init__(inputs, outputs, name=name)
        self.config = config

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keras.saving.register_keras_serializable("stable_diffusion_tf")(cls)

    def derived(self, inputs, outputs) -> keras.Model:
        """Another model of these layers and weights, none of them copied."""
        with building(self.dtype_policy):
            return keras.Model(inputs, outputs)

    def get_config(self):
        return {
            "config": asdict(self.config),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": [layer.trainable for layer in self.layers],
        }

    @classmethod
    def from_config(cls, config):
        fields = {  # JSON has no tuples
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config["config"].items()
        }
        dtype = keras.dtype_policies.get(config["dtype"])
        model = cls(cls.Config(**fields), dtype, config["name"])
        for layer, trainable in zip(model.layers, config["trainable"], strict=True):
            layer.trainable = trainable
        return model
