"""What the four networks have in common as Keras models: how Keras saves and loads them."""

from dataclasses import asdict

import keras


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

    def get_config(self):
        return {
            "config": asdict(self.config),
            "dtype": self.layers[-1].dtype_policy.name,  # the model's own is the global one
            "name": self.name,
            "trainable": [layer.trainable for layer in self.layers],
        }

    @classmethod
    def from_config(cls, config):
        fields = {  # JSON has no tuples
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config["config"].items()
        }
        model = cls(cls.Config(**fields), config["dtype"], config["name"])
        for layer, trainable in zip(model.layers, config["trainable"], strict=True):
            layer.trainable = trainable
        return model
