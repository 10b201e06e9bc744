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
    _fuse_attention(model)
    _fuse_group_norms(model)
    return model, names[len(variables) :], traced.structured_outputs, weights


def _source(node, i=0):
    """What the node's input `i` is made by, past casts."""
    while (node := node.input_value(i).get_node()).get_type_name() == "Convert":
        i = 0
    return node


def _are(nodes, types):
    return [node.get_type_name() for node in nodes] == types.split()


def _fuse_group_norms(model):
    """Makes `GroupNormalization`, as `models.layers` writes it, the one operation there is.

    Without it, groups keep channels last, between convolutions that have them first.
    """
    first, last = (opset13.constant(np.array(axes)) for axes in ((0, 3, 1, 2), (0, 2, 3, 1)))
    for node in model.get_ordered_ops():
        if not (_are([node], "Reshape") and _are([total := _source(node)], "Add")):
            continue
        product, shift = _source(total), _source(total, 1)  # x * scale, beta - mean * scale
        if not _are([product, shift], "Multiply Subtract"):
            continue
        x, scale, beta = _source(product), _source(product, 1), _source(shift)
        if not _are([x, scale, beta], "Reshape Multiply Reshape"):
            continue
        gamma, deviation = _source(scale), _source(scale, 1)  # (variance + epsilon)**-0.5
        if not _are([gamma, deviation], "Reshape Power"):
            continue
        data = x.input_value(0)
        weights = (opset13.convert_like(w.input_value(0), data) for w in (gamma, beta))
        groups = x.get_output_partial_shape(0)[2].get_length()
        epsilon = _source(_source(deviation), 1).get_data().item()
        fused = opset13.group_normalization(
            opset13.transpose(data, first), *weights, groups, epsilon
        )
        node.output(0).replace(opset13.transpose(fused, last).output(0))


def _fuse_attention(model):
    """Makes softmax(scale * q k^T) v, as Keras writes it, the one operation that OpenVINO has."""

    swap = opset13.constant(np.array([0, 2, 1, 3]))  # (B, N, heads, d) <-> (B, heads, N, d)
    for node in model.get_ordered_ops():
        if not (_are([node], "Einsum") and _are([softmax := _source(node)], "Softmax")):
            continue
        if not _are([scaled := _source(softmax)], "Multiply"):  # masked
            continue
        logits = _source(scaled)
        scale = opset13.convert_like(scaled.input_value(1), logits)
        q, k, v = (
            opset13.transpose(values, swap)
            for values in (*logits.input_values(), node.input_value(1))
        )
        fused = opset13.scaled_dot_product_attention(q, k, v, scale=scale)
        node.output(0).replace(opset13.transpose(fused, swap).output(0))


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
