"""The moving average of the weights, which draws better pictures than the weights themselves."""

from contextlib import contextmanager

from keras import ops


def values(variables):
    """The variables' present values, as NumPy arrays of their own."""
    return [ops.convert_to_numpy(ops.copy(variable)) for variable in variables]


@contextmanager
def averaged(optimizer, variables):
    """Inside, `variables` hold the average that `optimizer` keeps; afterwards their own values.

    Without `use_ema=True` in the optimizer there is no average, and nothing changes.
    """
    own = values(variables)
    optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, own, strict=True):
            variable.assign(value)
