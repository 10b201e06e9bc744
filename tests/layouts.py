"""The tiny model in the layouts of other worlds, written here by hand and not by our tables."""

import io
import json
import pickle
import struct
import zipfile
from types import SimpleNamespace

import h5py
import numpy as np
import synth

# Ours (diffusers') -> CompVis's, for the tiny UNet: levels of 32 with and 64 without attention.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "decoder.up_blocks.0.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "decoder.up_blocks.1.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.1.resnets.1": "decoder.up.0.block.1",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1",
    "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.mid_block.attentions.0": "encoder.mid.attn_1",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.mid_block.attentions.0": "decoder.mid.attn_1",
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
}
VAE_INSIDE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _renamed(name, blocks, inside):
    layer, suffix = name.rsplit(".", 1)
    for ours, theirs in blocks.items():
        if layer == ours:
            return f"{theirs}.{suffix}"
        if layer.startswith(ours + "."):
            rest = layer[len(ours) + 1 :]
            return f"{theirs}.{inside.get(rest, rest)}.{suffix}"
    return name


def compvis_unet(weights):
    return {
        f"model.diffusion_model.{_renamed(name, UNET, UNET_RESNET)}": weight
        for name, weight in weights.items()
    }


def compvis_ema(weights):
    average = {"model_ema.decay": np.float32([0.9]), "model_ema.num_updates": np.int32([7])}
    for name, weight in compvis_unet(weights).items():
        average["model_ema." + name.removeprefix("model.").replace(".", "")] = weight
    return average


def compvis_vae(weights, prefix="first_stage_model."):
    """The attention is stored as 1x1 convolutions."""
    return {
        prefix + _renamed(name, VAE, VAE_INSIDE): weight[..., None, None]
        if ".attentions." in name and weight.ndim == 2
        else weight
        for name, weight in weights.items()
    }


def clip(weights):
    named = {f"cond_stage_model.transformer.{name}": weight for name, weight in weights.items()}
    named["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    return named


def open_clip(weights, layers=3):
    """With one layer more, which is not used."""
    w = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    named = {
        "token_embedding.weight": w["embeddings.token_embedding.weight"],
        "positional_embedding": w["embeddings.position_embedding.weight"],
        "ln_final.weight": w["final_layer_norm.weight"],
        "ln_final.bias": w["final_layer_norm.bias"],
        "text_projection": np.eye(len(w["final_layer_norm.bias"]), dtype=np.float32),
        "logit_scale": np.float32(4.6),
    }
    for layer in range(layers + 1):
        theirs = f"transformer.resblocks.{layer}"
        ours = f"encoder.layers.{min(layer, layers - 1)}"
        for kind in ("weight", "bias"):
            for our_name, name in OPEN_CLIP.items():
                named[f"{theirs}.{name}.{kind}"] = w[f"{ours}.{our_name}.{kind}"]
            named[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(
                [w[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    return {f"cond_stage_model.model.{name}": np.asarray(v) for name, v in named.items()}


def compvis(weights, text=clip):
    """A whole checkpoint, with the schedule's buffers."""
    return {
        **compvis_unet(weights["unet"]),
        **compvis_vae(weights["vae"]),
        **text(weights["text_encoder"]),
        "betas": np.zeros(1000, np.float64),
        "sqrt_one_minus_alphas_cumprod": np.zeros(1000, np.float32),
        "posterior_mean_coef1": np.zeros(1000, np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
    }


# Keras: layers in the order in which the networks call them.


def _resnet(name, shortcut, time):
    yield from (f"{name}.norm1", f"{name}.conv1")
    if time:
        yield f"{name}.time_emb_proj"
    yield from (f"{name}.norm2", f"{name}.conv2")
    if shortcut:
        yield f"{name}.conv_shortcut"


def _transformer(name):
    block = f"{name}.transformer_blocks.0"
    yield from (f"{name}.norm", f"{name}.proj_in")
    for i in (1, 2):
        yield f"{block}.norm{i}"
        yield from (f"{block}.attn{i}.to_{part}" for part in ("q", "k", "v", "out.0"))
    yield from (f"{block}.norm3", f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
    yield f"{name}.proj_out"


def _vae_middle(name):
    yield from _resnet(f"{name}.resnets.0", False, False)
    for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.attentions.0.{part}"
    yield from _resnet(f"{name}.resnets.1", False, False)


def keras_text_encoder():
    yield from ("embeddings.token_embedding", "embeddings.position_embedding")
    for i in range(3):
        layer = f"encoder.layers.{i}"
        yield f"{layer}.layer_norm1"
        yield from (f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        yield from (f"{layer}.layer_norm2", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
    yield "final_layer_norm"


def keras_unet(functional):
    second = "time_embedding.linear_2"
    yield "time_embedding.linear_1"
    yield from ("conv_in", second) if functional else (second, "conv_in")
    yield from _resnet("down_blocks.0.resnets.0", False, True)
    yield from _transformer("down_blocks.0.attentions.0")
    yield "down_blocks.0.downsamplers.0.conv"
    yield from _resnet("down_blocks.1.resnets.0", True, True)
    yield from _resnet("mid_block.resnets.0", False, True)
    yield from _transformer("mid_block.attentions.0")
    yield from _resnet("mid_block.resnets.1", False, True)
    yield from _resnet("up_blocks.0.resnets.0", True, True)
    yield from _resnet("up_blocks.0.resnets.1", True, True)
    yield "up_blocks.0.upsamplers.0.conv"
    for i in range(2):
        yield from _resnet(f"up_blocks.1.resnets.{i}", True, True)
        yield from _transformer(f"up_blocks.1.attentions.{i}")
    yield from ("conv_norm_out", "conv_out")


def keras_encoder():
    yield "encoder.conv_in"
    yield from _resnet("encoder.down_blocks.0.resnets.0", False, False)
    yield "encoder.down_blocks.0.downsamplers.0.conv"
    yield from _resnet("encoder.down_blocks.1.resnets.0", True, False)
    yield from _vae_middle("encoder.mid_block")
    yield from ("encoder.conv_norm_out", "encoder.conv_out", "quant_conv")


def keras_decoder():
    yield from ("post_quant_conv", "decoder.conv_in")
    yield from _vae_middle("decoder.mid_block")
    yield from _resnet("decoder.up_blocks.0.resnets.0", False, False)
    yield from _resnet("decoder.up_blocks.0.resnets.1", False, False)
    yield "decoder.up_blocks.0.upsamplers.0.conv"
    yield from _resnet("decoder.up_blocks.1.resnets.0", True, False)
    yield from _resnet("decoder.up_blocks.1.resnets.1", False, False)
    yield from ("decoder.conv_norm_out", "decoder.conv_out")


def keras_weights(weights, layers):
    """[(layer, suffix, array)]: Keras's names of arrays and its order of axes."""
    for layer in layers:
        for suffix in ("weight", "bias"):
            names = (f"text_model.{layer}.{suffix}", f"{layer}.{suffix}")
            name = next((name for name in names if name in weights), None)
            if name is None:
                continue
            value = weights[name]
            if ".attentions.0.to_" in layer and value.ndim == 2:  # the autoencoder's
                value = value[..., None, None]
            yield (
                layer,
                kind(layer, suffix),
                value.transpose(AXES[value.ndim, "embeddings." in layer]),
            )


AXES = {(1, False): (0,), (2, False): (1, 0), (4, False): (2, 3, 1, 0), (2, True): (0, 1)}


def kind(layer, suffix):
    last = layer.rpartition(".")[2]
    if "norm" in last:
        return {"weight": "gamma", "bias": "beta"}[suffix]
    if "embeddings." in layer:
        return "embeddings"
    return {"weight": "kernel", "bias": "bias"}[suffix]


def write_h5(path, rows, functional, split=False):
    """As Keras 2 does: one group of a subclassed model, or one a layer of a functional one."""
    groups = {}
    for layer, suffix, value in rows:
        number = len({row[0] for group in groups.values() for row in group})
        number -= any(row[0] == layer for group in groups.values() for row in group)
        group = f"layer_{number}" if functional else "some_model"
        groups.setdefault(group, []).append((layer, f"layer_{number}/{suffix}:0", value))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"input_1", *(name.encode() for name in groups), b"dropout"]
        file.attrs["backend"] = b"tensorflow"
        for empty in ("input_1", "dropout"):
            file.create_group(empty).attrs["weight_names"] = np.zeros(0, "S1")
        for group, held in groups.items():
            target = file.create_group(group)
            names = [name.encode() for _, name, _ in held]
            if split:
                for i, start in enumerate(range(0, len(names), 3)):
                    target.attrs[f"weight_names{i}"] = names[start : start + 3]
            else:
                target.attrs["weight_names"] = names
            for _, name, value in held:
                target.create_dataset(name, data=value)


def write_keras(folder, weights, functional):
    """Four files with names that say nothing; {network: path}."""
    vae, text, unet = weights["vae"], weights["text_encoder"], weights["unet"]
    rows = {
        "text_encoder": keras_weights(text, keras_text_encoder()),
        "unet": keras_weights(unet, keras_unet(functional)),
        "encoder": keras_weights(vae, keras_encoder()),
        "decoder": keras_weights(vae, keras_decoder()),
    }
    folder.mkdir()
    paths = {part: folder / f"{i}.weights" for i, part in enumerate(rows)}
    for part, path in paths.items():
        write_h5(path, rows[part], functional, split=not functional)
    return paths


# PyTorch's formats, pickled by hand.

TORCH = {"<f4": "Float", "<f2": "Half", "<f8": "Double", "<i8": "Long", "<i4": "Int"}


def said(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


def numbers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(dtype, key, count):
    what = said("torch", f"{TORCH[dtype]}Storage")
    return b"(" + text("storage") + what + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(dtype, key, shape, count=None, offset=0, strides=None):
    """What stands for a tensor in the pickle."""
    count = int(np.prod(shape)) if count is None else count
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return (
        said("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage(dtype, key, count)
        + integer(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + said("collections", "OrderedDict")
        + b")RtR"
    )


def described(tensors):
    """The pickle of {"epoch": 3, "state_dict": OrderedDict(tensors)}; a storage for each."""
    items = b"".join(
        text(name) + tensor(value.dtype.str, str(i), value.shape)
        for i, (name, value) in enumerate(tensors.items())
    )
    table = said("collections", "OrderedDict") + b")R(" + items + b"u"
    table += b"}" + text("_metadata") + b"}sb"  # attributes of the OrderedDict
    return b"\x80\x02}(" + text("epoch") + integer(3) + text("state_dict") + table + b"u."


def contents(tensors):
    """The bytes of each storage."""
    return {str(i): value.tobytes() for i, value in enumerate(tensors.values())}


def zipped(data, storages, folder="archive"):
    """PyTorch's zip format, of a pickle and the bytes of each storage."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"{folder}/data/{key}", content)
        archive.writestr(f"{folder}/version", "3\n")
    return made.getvalue()


def legacy(data, storages, sizes):
    """The format before PyTorch 1.6; `sizes` are of the elements of each storage."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system))
    tail = b"".join(
        struct.pack("<Q", len(content) // sizes[key]) + content for key, content in storages.items()
    )
    return head + data + pickle.dumps(list(storages), 2) + tail


def write_ckpt(path, tensors, old=False):
    data, storages = described(tensors), contents(tensors)
    sizes = {str(i): value.itemsize for i, value in enumerate(tensors.values())}
    path.write_bytes(legacy(data, storages, sizes) if old else zipped(data, storages))


# Variables without a backend.


def variables(part, weights):
    """The variables of a network whose weights have these diffusers names."""
    made = []
    for name, weight in weights.items():
        layer, suffix = name.removeprefix("text_model.").rsplit(".", 1)
        value = weight.transpose(AXES[weight.ndim, "embeddings." in layer])
        made.append(
            SimpleNamespace(
                path=f"{layer}/{kind(layer, suffix)}",
                shape=value.shape,
                dtype="float32",
                expected=value,
            )
        )
    halves = {"encoder": ("encoder.", "quant_conv"), "decoder": ("decoder.", "post_quant_conv")}
    return [v for v in made if part not in halves or v.path.startswith(halves[part])]


def published(name):
    """The variables of a published network, without values."""
    keys = json.loads((synth.DATA / f"{name}.json").read_text())
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in keys}
