"""TensorFlow: graphs of `tf.function`, with oneDNN's operations where a CPU is faster by them.

The names are those of `stable_diffusion_tf.compile`.
"""

import math
from contextvars import ContextVar
from functools import cache, partial, wraps

import keras
import tensorflow as tf
from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope
from tensorflow.python.ops import control_flow_util  # no public name tells
from tensorflow.python.util import _pywrap_util_port as built  # no public name tells

from stable_diffusion_tf.compile import having, onednn, plain

_ours: ContextVar[bool] = ContextVar("ours", default=False)  # being traced for nobody else's graphs
LARGE = 2**22  # numbers that TensorFlow has XLA compile for: a hundredth of a second's work
RUNS_AHEAD = False


def is_out_of_memory(error):
    return isinstance(error, tf.errors.ResourceExhaustedError)


def softmax(x):
    """Without casts where TensorFlow's own rounds once: two passes less over what is large."""
    once = not _in_xla() and _rounds_softmax_once(x.dtype)
    return ops.softmax(x) if once else plain.softmax(x)


def moments(x):
    return _normalizer(x).moments(x)


def affine(x, scale, shift):
    return _normalizer(x).affine(x, scale, shift)


def _normalizer(x):
    """Who computes what is asked of x: of a picture or two of known size, oneDNN."""
    most = onednn.PICTURES.get(keras.backend.standardize_dtype(x.dtype), 0)
    return onednn if _is_for_onednn(x) and x.shape[0] <= most else plain


def _is_for_onednn(x):
    """Whether TensorFlow's oneDNN can take x; of unknown size, it may be for an engine."""
    known = x.shape.is_fully_defined()
    return known and not _in_xla() and uses_onednn()


def standardize(x, gamma, beta, epsilon):
    ours = _ours.get() and not tf.executing_eagerly() and _is_for_onednn(x)
    by = onednn if ours and onednn.can_standardize(x) else plain
    weights = (tf.convert_to_tensor(weight) for weight in (gamma, beta))
    return _standardizer(by, epsilon)(x, *weights)


@cache
def _standardizer(by, epsilon):
    def normal(x, gamma, beta):
        return plain.standardize(x, gamma, beta, epsilon)

    def fast(x, gamma, beta):
        return by.standardize(x, gamma, beta, epsilon)

    return traced_once(normal) if by is plain else differentiated_as(normal, fast)


def _in_xla():
    """Whether what is being traced will be compiled through XLA."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@cache
def _rounds_softmax_once(dtype):
    """Whether its softmax of `dtype` is float32's, rounded, as oneDNN's of what it knows is."""
    with tf.init_scope():
        x = tf.cast(tf.random.stateless_normal((8, 512), (0, 0)), dtype)
        return bool(tf.reduce_all(tf.nn.softmax(x) == plain.softmax(x)))


@cache
def uses_onednn():
    return built.IsMklEnabled() and not tf.config.list_physical_devices("GPU")


def from_numpy(array):
    if array.dtype == "bfloat16":  # which NumPy cannot hand over
        return tf.bitcast(from_numpy(array.view("uint16")), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def compiled(function, variables=(), jit=False):
    @_meant_to_retrace
    @tf.function(jit_compile=jit or None, autograph=False)
    def run(*args):
        with having(_ours, True):
            return function(*args)

    return run


def _meant_to_retrace(traced):
    """Once for each shape; TensorFlow warns of five, as if they were a mistake."""
    traced._omit_frequent_tracing_warning = True
    return traced


def fused(function):
    """By XLA only what is large: the rest takes less time than its compilation."""
    large, small = (traced_once(function, jit) for jit in (True, False))
    # XLA would keep more for its gradient than x.
    large = differentiated_as(function, large, jit=True)

    def call(x, *args):
        known = x.shape.is_fully_defined() and uses_onednn()
        return (large if known and math.prod(x.shape) >= LARGE else small)(x, *args)

    return call


def traced_once(function, jit=False):
    # Called, not copied into its callers: a graph takes more than twice the time to optimize if it
    # is twice the size.
    called = {"_noinline": True}
    traced = tf.function(
        function, autograph=False, jit_compile=jit or None, experimental_attributes=called
    )
    traced = _meant_to_retrace(traced)

    @wraps(function)
    def call(*args):
        # Engines want a flat graph; a trace for unknown sizes would serve known ones too, and one
        # for XLA what is not for it.
        unknown = not all(arg.shape.is_fully_defined() for arg in args if tf.is_tensor(arg))
        flat = tf.executing_eagerly() or in_stateless_scope() or unknown or _in_xla()
        if flat:
            return function(*args)
        # Whose result's shape the optimizer does not know, it fuses nothing with.
        return tf.nest.map_structure(lambda y: tf.ensure_shape(y, y.shape), traced(*args))

    return call


def differentiated_as(function, fast, jit=False):
    # Called, so not before `upstream` is there: what it computes again would be kept till then.
    @partial(traced_once, jit=jit)
    def gradient(upstream, *args):
        with tf.GradientTape() as tape:
            tape.watch(args)
            result = function(*args)
        return tape.gradient(result, args, upstream)

    @tf.custom_gradient
    def call(*args):
        return fast(*args), lambda upstream: gradient(upstream, *args)

    return call


def training_step(loss, variables, optimizer, jit, frozen):
    @_meant_to_retrace
    @tf.function(jit_compile=jit or None, autograph=False)
    def step(*batch):
        with having(_ours, True), tf.GradientTape() as tape:
            value = loss(*batch)
            scaled = optimizer.scale_loss(value)
        gradients = tape.gradient(scaled, [v.value for v in variables])
        # An embedding's is sparse, a row a token: clipping would not sum a token's rows.
        optimizer.apply([tf.convert_to_tensor(g) for g in gradients], variables)
        return value

    return step
