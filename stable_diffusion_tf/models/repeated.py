"""Blocks that a network has many of, each with weights of its own, traced once for all."""

import keras

from stable_diffusion_tf.compile import traced_once


def repeated(part):
    """Returns `part` as `block(*tensors, *sizes, name=…)`, which is traced once for equal sizes.

    TensorFlow takes half a millisecond to trace an operation, and a transformer block has 300: that
    is seconds before Stable Diffusion's first step, if each block is traced anew.

    Args:
        part: `part(*tensors, *sizes, name)` -> a tensor like the first, through layers whose names
            begin with `name`. For equal `sizes`, it makes layers that differ in their weights only.
    """
    runs = {}

    def block(*args, name):
        tensors = [arg for arg in args if keras.backend.is_keras_tensor(arg)]
        sizes = args[len(tensors) :]
        inputs = [keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in tensors]
        model = Repeated(inputs, part(*inputs, *sizes, name), name=name)
        model.run = runs.setdefault(sizes, model.run)
        return model(tensors)

    return block


class Repeated(keras.Model):
    """A functional model that runs through `run(values, inputs)`, given its variables' values."""

    def __init__(self, inputs, outputs, name):
        super().__init__(inputs, outputs, name=name)
        self.autocast = False  # its layers cast what they are given
        variables, call = self.variables, super().call

        def run(values, inputs):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(inputs)

        self.run = traced_once(run)

    def call(self, inputs, training=None, mask=None):
        return self.run([variable.value for variable in self.variables], inputs)

    def compute_output_spec(self, inputs, training=None, mask=None):
        return keras.KerasTensor(inputs[0].shape, self.outputs[0].dtype)
