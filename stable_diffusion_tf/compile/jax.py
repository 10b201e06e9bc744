"""JAX: all that is compiled is compiled through XLA; what XLA does by itself is left to it.

The names are those of `stable_diffusion_tf.compile`.
"""

from functools import partial

import jax
import keras
from keras import ops

from stable_diffusion_tf.compile.plain import affine as affine
from stable_diffusion_tf.compile.plain import moments as moments
from stable_diffusion_tf.compile.plain import softmax as softmax
from stable_diffusion_tf.compile.plain import standardize as standardize

RUNS_AHEAD = True


def is_out_of_memory(error):
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def from_numpy(array):
    return ops.convert_to_tensor(array)


def uses_onednn():
    return False


def compiled(function, variables=(), jit=False):
    @jax.jit
    def run(values, args):  # a variable that is no argument would be a constant
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*args)

    def call(*args):
        # Not by `value`, which looks for scopes each time: a millisecond for a UNet's 686.
        return run([v._value for v in variables], args)

    return call


def traced_once(function):
    return function  # which JAX traces in a fraction of the time


fused = traced_once


def differentiated_as(function, fast):
    return fast


def training_step(loss, variables, optimizer, jit, frozen):
    held = [*variables, *optimizer.variables]
    read = [*held, *frozen]

    def loss_of(values, state, fixed, batch):  # the state too: the loss's scale is part of it
        with keras.StatelessScope(list(zip(read, [*values, *state, *fixed], strict=True))):
            value = loss(*batch)
            return optimizer.scale_loss(value), value

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(values, state, fixed, batch):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (_, value), gradients = gradient(values, state, fixed, batch)
        return value, *optimizer.stateless_apply(state, gradients, values)

    def step(*batch):
        parts = variables, optimizer.variables, frozen
        value, values, state = update(*([v.value for v in part] for part in parts), batch)
        for variable, new in zip(held, [*values, *state], strict=True):
            variable.assign(new)
        return value

    return step
