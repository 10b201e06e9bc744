"""The only place that knows Keras's backends: how each compiles, differentiates, takes an array.

Everything else is written in `keras.ops` and `keras.layers`. What TensorFlow has traced, an engine
may run: each is a module here, named after the package that it needs. `onednn` is TensorFlow's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from importlib import import_module
from importlib.util import find_spec

import keras
from keras.src.backend.common.stateless_scope import in_stateless_scope

_tell: ContextVar[Callable[[], None]] = ContextVar("tell", default=lambda: None)
_ours: ContextVar[bool] = ContextVar("ours", default=False)  # being traced for nobody else's graphs
LARGE = 2**22  # numbers that TensorFlow has XLA compile for: a hundredth of a second's work


def backend():
    """Returns what is known of the Keras backend in use.

    Raises:
        ValueError: it is one that functions cannot be compiled for.
    """
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise ValueError(
            f"the Keras backend {name!r} is not supported; set KERAS_BACKEND to "
            f"{' or '.join(_BACKENDS)}"
        )
    return _BACKENDS[name]


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
    if own is not _TensorFlow:
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
    with _set(_tell, tell):
        yield


@contextmanager
def _set(variable, value):
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
    return backend().runs_ahead


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


class _Plain:
    """What any backend computes, in `keras.ops`; the engine `openvino` knows group norms by it."""

    @staticmethod
    def softmax(x):
        return keras.ops.cast(keras.ops.softmax(keras.ops.cast(x, "float32")), x.dtype)

    @staticmethod
    def moments(x):
        return keras.ops.moments(keras.ops.cast(x, "float32"), axes=[1], keepdims=True)

    @staticmethod
    def affine(x, scale, shift):
        return keras.ops.cast(keras.ops.cast(x, "float32") * scale + shift, x.dtype)

    @staticmethod
    def standardize(x, gamma, beta, epsilon):
        ops, dtype = keras.ops, x.dtype
        x, gamma, beta = (ops.cast(each, "float32") for each in (x, gamma, beta))
        x = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
        return ops.cast(x * ops.rsqrt(variance + epsilon) * gamma + beta, dtype)


class _TensorFlow:
    runs_ahead = False

    @staticmethod
    def is_out_of_memory(error):
        import tensorflow as tf

        return isinstance(error, tf.errors.ResourceExhaustedError)

    @staticmethod
    def softmax(x):
        """Without casts where TensorFlow's own rounds once: two passes less over what is large."""
        once = not _TensorFlow.in_xla() and _TensorFlow.rounds_softmax_once(x.dtype)
        return keras.ops.softmax(x) if once else _Plain.softmax(x)

    @staticmethod
    def moments(x):
        return _TensorFlow.normalizer(x).moments(x)

    @staticmethod
    def affine(x, scale, shift):
        return _TensorFlow.normalizer(x).affine(x, scale, shift)

    @staticmethod
    def normalizer(x):
        """Who computes what is asked of x: of a picture or two of known size, oneDNN."""
        if _TensorFlow.is_for_onednn(x):
            onednn = import_module(f"{__name__}.onednn")
            if x.shape[0] <= onednn.PICTURES.get(keras.backend.standardize_dtype(x.dtype), 0):
                return onednn
        return _Plain

    @staticmethod
    def is_for_onednn(x):
        """Whether TensorFlow's oneDNN can take x; of unknown size, it may be for an engine."""
        known = x.shape.is_fully_defined()
        return known and not _TensorFlow.in_xla() and _TensorFlow.uses_onednn()

    @staticmethod
    def standardize(x, gamma, beta, epsilon):
        import tensorflow as tf

        onednn = import_module(f"{__name__}.onednn")
        ours = _ours.get() and not tf.executing_eagerly() and _TensorFlow.is_for_onednn(x)
        by = onednn if ours and onednn.can_standardize(x) else _Plain
        weights = (tf.convert_to_tensor(weight) for weight in (gamma, beta))
        return _TensorFlow.standardizer(by, epsilon)(x, *weights)

    @staticmethod
    @cache
    def standardizer(by, epsilon):
        def plain(x, gamma, beta):
            return _Plain.standardize(x, gamma, beta, epsilon)

        def fast(x, gamma, beta):
            return by.standardize(x, gamma, beta, epsilon)

        if by is _Plain:
            return _TensorFlow.traced_once(plain)
        return _TensorFlow.differentiated_as(plain, fast)

    @staticmethod
    def in_xla():
        """Whether what is being traced will be compiled through XLA."""
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util  # no public name tells

        return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())

    @staticmethod
    @cache
    def rounds_softmax_once(dtype):
        """Whether its softmax of `dtype` is float32's, rounded, as oneDNN's of what it knows is."""
        import tensorflow as tf

        with tf.init_scope():
            x = tf.cast(tf.random.stateless_normal((8, 512), (0, 0)), dtype)
            return bool(tf.reduce_all(tf.nn.softmax(x) == _Plain.softmax(x)))

    @staticmethod
    @cache
    def uses_onednn():
        import tensorflow as tf
        from tensorflow.python.util import _pywrap_util_port as built  # no public name tells

        return built.IsMklEnabled() and not tf.config.list_physical_devices("GPU")

    @staticmethod
    def from_numpy(array):
        import tensorflow as tf

        if array.dtype == "bfloat16":  # which NumPy cannot hand over
            return tf.bitcast(_TensorFlow.from_numpy(array.view("uint16")), tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())

    @staticmethod
    def compiled(function, variables=(), jit=False):
        import tensorflow as tf

        @_TensorFlow.meant_to_retrace
        @tf.function(jit_compile=jit or None, autograph=False)
        def run(*args):
            with _set(_ours, True):
                return function(*args)

        return run

    @staticmethod
    def meant_to_retrace(traced):
        """Once for each shape; TensorFlow warns of five, as if they were a mistake."""
        traced._omit_frequent_tracing_warning = True
        return traced

    @staticmethod
    def fused(function):
        """By XLA only what is large: the rest takes less time than its compilation."""
        large, small = (_TensorFlow.traced_once(function, jit) for jit in (True, False))
        # XLA would keep more for its gradient than x.
        large = _TensorFlow.differentiated_as(function, large, jit=True)

        def call(x, *args):
            known = x.shape.is_fully_defined() and _TensorFlow.uses_onednn()
            return (large if known and math.prod(x.shape) >= LARGE else small)(x, *args)

        return call

    @staticmethod
    def traced_once(function, jit=False):
        import tensorflow as tf

        # Called, not copied into its callers: a graph takes more than twice the time to optimize if
        # it is twice the size.
        called = {"_noinline": True}
        traced = _TensorFlow.meant_to_retrace(
            tf.function(
                function,
                autograph=False,
                jit_compile=jit or None,
                experimental_attributes=called,
            )
        )

        @wraps(function)
        def call(*args):
            # Engines want a flat graph; a trace for unknown sizes would serve known ones too, and
            # one for XLA what is not for it.
            unknown = not all(arg.shape.is_fully_defined() for arg in args if tf.is_tensor(arg))
            flat = tf.executing_eagerly() or in_stateless_scope() or unknown or _TensorFlow.in_xla()
            if flat:
                return function(*args)
            # Whose result's shape the optimizer does not know, it fuses nothing with.
            return tf.nest.map_structure(lambda y: tf.ensure_shape(y, y.shape), traced(*args))

        return call

    @staticmethod
    def differentiated_as(function, fast, jit=False):
        import tensorflow as tf

        # Called, so not before `upstream` is there: what it computes again would be kept till then.
        @partial(_TensorFlow.traced_once, jit=jit)
        def gradient(upstream, *args):
            with tf.GradientTape() as tape:
                tape.watch(args)
                result = function(*args)
            return tape.gradient(result, args, upstream)

        @tf.custom_gradient
        def call(*args):
            return fast(*args), lambda upstream: gradient(upstream, *args)

        return call

    @staticmethod
    def training_step(loss, variables, optimizer, jit, frozen):
        import tensorflow as tf

        @_TensorFlow.meant_to_retrace
        @tf.function(jit_compile=jit or None, autograph=False)
        def step(*batch):
            with _set(_ours, True), tf.GradientTape() as tape:
                value = loss(*batch)
                scaled = optimizer.scale_loss(value)
            gradients = tape.gradient(scaled, [v.value for v in variables])
            # An embedding's is sparse, a row a token: clipping would not sum a token's rows.
            optimizer.apply([tf.convert_to_tensor(g) for g in gradients], variables)
            return value

        return step


class _Jax(_Plain):
    runs_ahead = True

    @staticmethod
    def is_out_of_memory(error):
        import jax

        return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)

    @staticmethod
    def from_numpy(array):
        return keras.ops.convert_to_tensor(array)

    @staticmethod
    def uses_onednn():
        return False

    @staticmethod
    def compiled(function, variables=(), jit=False):
        import jax

        @jax.jit
        def run(values, args):  # a variable that is no argument would be a constant
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*args)

        def call(*args):
            # Not by `value`, which looks for scopes each time: a millisecond for a UNet's 686.
            return run([v._value for v in variables], args)

        return call

    @staticmethod
    def traced_once(function):
        return function  # which JAX traces in a fraction of the time

    fused = traced_once

    @staticmethod
    def differentiated_as(function, fast):
        return fast

    @staticmethod
    def training_step(loss, variables, optimizer, jit, frozen):
        import jax

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


_BACKENDS = {"tensorflow": _TensorFlow, "jax": _Jax}
ENGINES = ("openvino",)
