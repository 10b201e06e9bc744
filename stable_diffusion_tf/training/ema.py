"""The moving average of the weights, which draws better pictures than the weights themselves."""

from contextlib import contextmanager

from keras import ops


def values(variables):
    """The variables' present values, as NumPy arrays of their own."""
    return [ops.convert_to_numpy(ops.copy(variable)) for variable in variables]


def take_average(optimizer, variables):
    """Sets `variables` to the average that `optimizer` keeps; leaves them where there is none.

    There is none without `use_ema=True`, nor before the optimizer's first update, which loss
    scaling leaves out while gradients overflow.
    """
    if int(optimizer.iterations):
        optimizer.finalize_variable_values(variables)
        for variable in variables:  # not the average's own memory: on JAX, `predict` frees it
            variable.assign(ops.copy(variable))


@contextmanager
def averaged(optimizer, variables):
    """Inside, `variables` hold the average as of `take_average`; afterwards their own values."""
    own = values(variables)
    take_average(optimizer, variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, own, strict=True):
            variable.assign(value)
