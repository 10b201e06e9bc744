"""The only place that knows Keras's backends: how each compiles, differentiates, takes an array.

Everything else is written in `keras.ops` and `keras.layers`. Each backend is a module here, named
after the package that it needs; and so is each engine, which may run what TensorFlow has traced.
`onednn` is TensorFlow's own, `plain` what any backend has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import keras

_tell: ContextVar[Callable[[], None]] = ContextVar("tell", default=lambda: None)
BACKENDS = ("tensorflow", "jax")
ENGINES = ("openvino",)


def backend():
    """Returns the module of the Keras backend in use.

    Raises:
        ValueError: it is one that functions cannot be compiled for.
    """
    name = keras.backend.backend()
    if name not in BACKENDS:
        raise ValueError(
            f"the Keras backend {name!r} is not supported; set KERAS_BACKEND to "
            f"{' or '.join(BACKENDS)}"
        )
    return import_module(f"{__name__}.{name}")


def compiler(engine: str | None = None, jit: bool = False) -> Callable:
    """Returns `compiled(function, variables=())`, which compiles once per input shape.

    `function` is pure in its arguments: tensors, nested tuples of them, or None. `variables` are
    the Keras variables that it reads. The Keras backend's own code sees their values at each call;
    an engine those that they had when the shape was compiled.

    Args:
        engine: None: the Keras backend itself; or one of `ENGINES`, for inference only.
        jit: compile through XLA. On the JAX backend everything is, whatever this says.

    Raises:
        ValueError: the Keras backend is not supported, the engine is unknown, or they or `jit` do
            not go together.
        ImportError: the engine is not installed.
    """
    own = backend()
    if engine is None:
        return _telling(partial(own.compiled, jit=jit))
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}; or none")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"engine {engine!r} runs what TensorFlow has traced; set KERAS_BACKEND to tensorflow, "
            "or leave the engine out"
        )
    if jit:
        raise ValueError(f"engine {engine!r} does without XLA; leave jit_compile out")
    if find_spec(engine) is None:
        raise ImportError(
            f"engine {engine!r} is not installed: run `pip install {engine}`, or leave it out"
        )
    return _telling(import_module(f"{__name__}.{engine}").compiled)


@contextmanager
def when_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Within, `tell()` is called in this thread whenever something is about to be compiled."""
    with having(_tell, tell):
        yield


@contextmanager
def having(variable: ContextVar, value: Any) -> Iterator[None]:
    """Within, the variable has that value in this thread."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _telling(compiled):
    def tells(function, variables=()):
        @wraps(function)
        def traced(*args):  # Python runs it when it is compiled, and only then
            _tell.get()()
            return function(*args)

        return compiled(traced, variables)

    return tells


def uses_onednn() -> bool:
    """Whether TensorFlow computes, on a CPU, with its oneDNN operations."""
    return backend().uses_onednn()


def runs_ahead() -> bool:
    """Whether, on JAX, what is compiled returns before it has computed, and takes such results."""
    return backend().RUNS_AHEAD


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Within, the backend's own error when it runs out of memory is a MemoryError of `message`."""
    try:
        yield
    except Exception as error:
        if backend().is_out_of_memory(error):
            raise MemoryError(message) from error
        raise


def softmax(x):
    """Of the last axis, computed in float32 whatever x is, and rounded to its type at the end."""
    return backend().softmax(x)


def moments(x):
    """Of x (B, N, ...) over N: the means and the variances (B, 1, ...), in float32."""
    return backend().moments(x)


def affine(x, scale, shift):
    """x (B, N, ...) * scale + shift, each (B, 1, ...) in float32, rounded once to x's type."""
    return backend().affine(x, scale, shift)


def standardize(x, gamma, beta, epsilon):
    """x (..., C), of mean 0 and variance 1 over C, * gamma + beta, each (C,).

    Computed in float32, rounded once to x's type.
    """
    return backend().standardize(x, gamma, beta, epsilon)


def traced_once(function):
    """Returns `function` for use in what is compiled: its calls of equal shapes share one trace.

    Tracing takes TensorFlow half a millisecond an operation, and large networks do the same to many
    tensors. `function` is pure, of tensors and of numbers, which are compiled in. The backend is
    asked for at the first call: models can be imported on one that is not supported.
    """
    return _when_called(function, lambda: backend().traced_once(function))


def fused(function):
    """Returns `function`, elementwise of its first tensor, in one pass over what is large.

    Of TensorFlow's own operations each is a pass; on a CPU, XLA compiles them to one. As for
    `traced_once`, `function` is pure.
    """
    return _when_called(function, lambda: backend().fused(function))


def differentiated_as(function):
    """Decorates a faster equivalent of `function`, of tensors, that keeps more for its gradient.

    TensorFlow differentiates `function` in its place.
    """

    def decorate(fast):
        return _when_called(fast, lambda: backend().differentiated_as(function, fast))

    return decorate


def _when_called(function, made):
    """`function` as `made()`, which asks for the backend, makes it at the first call."""
    made = cache(made)
    return wraps(function)(lambda *args: made()(*args))


def from_numpy(array):
    """Returns an array as a tensor: of its memory if the backend can, so change it no more.

    The memory begins at a multiple of 64 bytes.
    """
    return backend().from_numpy(array)


def training_step(loss, variables, optimizer, jit=False, frozen=()):
    """Returns `step(*batch) -> loss` that updates `variables` once; compiled.

    Args:
        loss: `loss(*batch)` -> scalar, computed from the variables' current values.
        variables: what to differentiate by; the optimizer is built for them.
        optimizer: a `keras.optimizers.Optimizer`, gradient scaling included.
        frozen: Keras variables that the loss reads and nothing updates. Large ones belong here: JAX
            would else copy them into the compiled code.
    """
    optimizer.build(variables)
    return backend().training_step(loss, variables, optimizer, jit, frozen)
