"""OpenVINO on the CPU (https://docs.openvino.ai): TensorFlow traces, OpenVINO computes.

In bfloat16 where the function computes in that, else in float32, float16's values too.
"""

import sys
import tempfile
import threading
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import tree

# With this package, importing OpenVINO tells its maker so, from a process that it forks.
sys.modules.setdefault("openvino_telemetry", None)

import openvino as ov  # noqa: E402
from openvino import opset13  # noqa: E402
from openvino.frontend import FrontEndManager  # noqa: E402


def compiled(function, variables=()):
    """Returns `function` compiled once per input shape, each with the weights of that moment."""
    ready, lock = {}, threading.Lock()

    def run(*args):
        leaves = tree.flatten(args)
        shapes = tuple(None if leaf is None else tuple(leaf.shape) for leaf in leaves)
        with lock:  # one thing at a time, on all cores
            if shapes not in ready:
                traced = _traced(function, variables, args)
                sizes = [shape for shape in shapes if shape is not None]
                ready[shapes] = _loaded(*_converted(traced, variables, sizes))
            return ready[shapes]([np.asarray(leaf) for leaf in leaves if leaf is not None])

    return run


def _traced(function, variables, args):
    """A TensorFlow graph; its inputs are the variables' values, then the tensors in `args`.

    Of these it knows ranks and channels: for known sizes, layers have ways that suit TensorFlow.
    """

    @tf.function(autograph=False)
    def traced(values, args):  # variables that are no arguments would be copied into the graph
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*args)

    def any_size(tensor):
        if tensor is None:
            return None
        unknown = [None] * (len(tensor.shape) - 1)
        return tf.TensorSpec([*unknown, *tensor.shape[-1:]], tensor.dtype)

    values = [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]
    return traced.get_concrete_function(values, tree.map_structure(any_size, args))


def _converted(traced, variables, shapes):
    """An OpenVINO model for inputs of `shapes`, and the rest of what `_loaded` takes."""
    with tempfile.TemporaryDirectory() as folder:  # of graphs in memory, it reads no bfloat16
        path = Path(folder, "graph.pb")
        path.write_bytes(_with_float32_constants(traced.graph).SerializeToString())
        frontend = FrontEndManager().load_by_framework("tf")
        draft = frontend.load(str(path))
        outputs = [draft.get_place_by_tensor_name(tensor.name) for tensor in traced.outputs]
        draft.override_all_outputs(outputs)
        model = frontend.convert(draft)

    names = [tensor.name for tensor in traced.inputs]
    model.reshape(dict(zip(names[len(variables) :], shapes, strict=True)))
    weights = []  # TensorFlow's own memory, not copied: it must live as long as the model
    for name, variable in zip(names, variables, strict=False):
        port = model.input(name)
        weights.append(np.asarray(variable.value.read_value_no_copy()).view(np.uint8))
        tensor = ov.Tensor(weights[-1], variable.shape, port.element_type)
        port.replace(opset13.constant(tensor, shared_memory=True).output(0))
        model.remove_parameter(port.get_node())

    # Whatever products are made of, OpenVINO rounds to bfloat16, even angles of hundreds. What only
    # leads to an output, it does not: so sines become outputs.
    waves = [node for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    model.add_results([opset13.result(node) for node in waves])
    _replace(model, ATTENTION, _attention)
    _replace(model, GROUP_NORM, _group_norm)
    return model, names[len(variables) :], traced.structured_outputs, weights


def _found(value, pattern):
    """What the names of a pattern stand for in what `value` is made of; None: it is made otherwise.

    A pattern is a name, or an operation and the patterns of its first inputs; casts count as none.
    """
    if isinstance(pattern, str):
        return {pattern: value}
    while (node := value.get_node()).get_type_name() == "Convert":
        value = node.input_value(0)
    operation, *patterns = pattern
    if node.get_type_name() != operation:
        return None
    parts = [_found(*pair) for pair in zip(node.input_values(), patterns, strict=False)]
    return None if None in parts else {name: v for part in parts for name, v in part.items()}


def _replace(model, pattern, operation):
    """Puts `operation(**found)` in place of all that fits the pattern."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == pattern[0] and (found := _found(node.output(0), pattern)):
            value = opset13.convert(operation(**found), node.get_output_element_type(0))
            node.output(0).replace(value.output(0))


# softmax(scale * q k^T) v, as Keras writes it.
ATTENTION = ("Einsum", ("Softmax", ("Multiply", ("Einsum", "q", "k"), "scale")), "v")


def _attention(q, k, v, scale):
    swap = opset13.constant(np.array([0, 2, 1, 3]))  # (B, N, heads, d) <-> (B, heads, N, d)
    q, k, v = (opset13.transpose(x, swap) for x in (q, k, v))
    scale = opset13.convert_like(scale, q)
    return opset13.transpose(opset13.scaled_dot_product_attention(q, k, v, scale=scale), swap)


# x * scale + (beta - mean * scale), as `models.layers.normalize_groups` and `plain.py` write it.
_MEAN = ("ReduceMean", ("ReduceMean",))  # of pixels, then of a group's channels
_VARIANCE = ("ReduceMean", ("Add", ("ReduceMean", ("SquaredDifference",))))
_SCALE = ("Multiply", ("Reshape", "gamma", "shape"), ("Power", ("Add", _VARIANCE, "epsilon")))
_SHIFT = ("Subtract", ("Reshape", "beta"), ("Multiply", _MEAN, _SCALE))
GROUP_NORM = ("Reshape", ("Add", ("Multiply", ("Reshape", "x"), _SCALE), _SHIFT))


def _group_norm(x, gamma, beta, shape, epsilon):
    """OpenVINO's own has channels first, like its convolutions, and weights of x's type."""
    first, last = (opset13.constant(np.array(axes)) for axes in ((0, 3, 1, 2), (0, 2, 3, 1)))
    gamma, beta = (opset13.convert_like(weights, x) for weights in (gamma, beta))
    groups, _ = shape.get_node().get_data()  # of gamma: groups, and channels of each
    epsilon = epsilon.get_node().get_data()
    x = opset13.transpose(x, first)
    x = opset13.group_normalization(x, gamma, beta, int(groups), float(epsilon))
    return opset13.transpose(x, last)


def _loaded(model, names, structure, weights):
    """Returns `run(inputs)`.

    Args:
        model: as converted.
        names: of the inputs.
        structure: of the outputs.
        weights: memory that the model reads.
    """
    types = {node.get_output_element_type(0) for node in model.get_ordered_ops()}
    precision = ov.Type.bf16 if ov.Type.bf16 in types else ov.Type.f32
    compiled_model = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    count = len(tree.flatten(structure))

    def run(inputs, held=weights):
        found = compiled_model(dict(zip(names, inputs, strict=True)), share_inputs=False)
        outputs = [keras.ops.convert_to_tensor(found[i]) for i in range(count)]
        return tree.pack_sequence_as(structure, outputs)

    return run


def _with_float32_constants(graph):
    """The definition of a TensorFlow graph; OpenVINO reads bfloat16 constants only as casts."""
    bfloat16, float32 = tf.bfloat16.as_datatype_enum, tf.float32.as_datatype_enum
    definition = graph.as_graph_def()
    for node in list(definition.node):
        if node.op == "Const" and node.attr["dtype"].type == bfloat16:
            value = tf.make_ndarray(node.attr["value"].tensor).astype(np.float32)
            constant = definition.node.add(op="Const", name=f"{node.name}/float32")
            constant.attr["dtype"].type = float32
            constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
            cast = definition.node.add(op="Cast", name=node.name, input=[constant.name])
            cast.attr["SrcT"].type, cast.attr["DstT"].type = float32, bfloat16
            definition.node.remove(node)
    return definition
