"""The published sizes, rebuilt from their names and shapes: 5 GB on disk, 12 GB of memory."""

import gc
import gzip
import json
import math
import shutil
import zipfile

import h5py
import layouts
import numpy as np
import pytest
import synth
from tiny import write_folder

from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.load import load_parts
from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.config import SD_1, SD_1_INPAINT, SD_2_BASE

pytestmark = pytest.mark.full

MODELS = {
    "sd15": (SD_1, {"text_encoder": "sd15_text_encoder", "unet": "sd15_unet", "vae": "sd15_vae"}),
    "sd21": (
        SD_2_BASE,
        {"text_encoder": "sd21_text_encoder", "unet": "sd21_unet", "vae": "sd15_vae"},
    ),
}
PARAMETERS = {
    "text_encoder": 123_060_480,
    "unet": 859_520_964,
    "encoder": 34_163_664,
    "decoder": 49_490_199,
}


LAYOUTS = {  # a writer for each, below; the bound is on the relative error
    "sd15 folder": ("sd15", "folder", 2e-5),
    "sd15 fp16 shards": ("sd15", "shards", 2e-3),
    "sd15 safetensors": ("sd15", "safetensors", 2e-5),
    "sd15 ckpt": ("sd15", "ckpt", 2e-5),
    "sd15 Keras": ("sd15", "keras", 2e-5),
    "sd15 KerasCV": ("sd15", "kerascv", 2e-5),
    "sd21 folder": ("sd21", "folder", 2e-5),
    "sd21 safetensors": ("sd21", "safetensors", 2e-5),
    "sd21 KerasCV": ("sd21", "kerascv", 2e-5),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    """(name, source, bound) of a whole model; on disk it is removed afterwards."""
    name, layout, bound = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(layout)
    yield name, WRITERS[layout](folder, name), bound
    shutil.rmtree(folder)


def write_diffusers(folder, name):
    config, names = MODELS[name]
    for part, keys in names.items():  # one at a time, to hold one in memory
        write_folder(folder, config, {part: synth.weights(keys)})
    return folder


def write_shards(folder, name):
    """The UNet's float16 weights in three files, as published."""
    config, names = MODELS[name]
    for part, keys in names.items():
        half = {key: w.astype(np.float16) for key, w in synth.weights(keys).items()}
        if part != "unet":
            write_folder(folder, config, {part: half})
            continue
        places = {key: f"part-{i % 3}-of-3.safetensors" for i, key in enumerate(half)}
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        for shard in set(places.values()):
            held = {key: half[key] for key in places if places[key] == shard}
            save_safetensors(held, folder / "unet" / shard)
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    return folder


def published(name):
    """Rows of what published files hold, from `data/NAME.json.gz`."""
    return json.loads(gzip.decompress((synth.DATA / f"{name}.json.gz").read_bytes()))


def compvis_makers(name):
    """{tensor's name in a single file: (shape, what makes it)}; made one at a time."""
    names = MODELS[name][1]
    shapes = {part: dict(json.loads((synth.DATA / f"{k}.json").read_text()))
              for part, k in names.items()}  # fmt: skip
    rows = published("compvis_keys")
    makers = {}
    for part, shaped in (("diffusion_model", "unet"), ("encoder", "vae"), ("decoder", "vae")):
        for theirs, ours in rows[part]:
            shape = tuple(shapes[shaped][ours])
            conv = (1, 1) if ".attn_1." in theirs and len(shape) == 2 else ()
            makers[theirs] = (
                shape + conv,
                lambda ours=ours, shape=shape, conv=conv: synth.weight(ours, shape).reshape(
                    shape + conv
                ),
            )
    if name == "sd15":
        for theirs, ours in rows["text_encoder"]:
            shape = shapes["text_encoder"][ours]
            makers[theirs] = (shape, lambda ours=ours, shape=shape: synth.weight(ours, shape))
    else:
        text = layouts.open_clip(synth.weights(names["text_encoder"]), layers=23)
        makers |= {key: (value.shape, lambda value=value: value) for key, value in text.items()}
    return makers


def write_safetensors(folder, name):
    makers, start, header = compvis_makers(name), 0, {}
    for key, (shape, _) in makers.items():
        end = start + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, make in makers.values():
            file.write(np.ascontiguousarray(make(), np.float32).tobytes())
    return path


def write_ckpt(folder, name):
    makers = compvis_makers(name)
    empty = np.float32(0)
    table = layouts.described(
        {k: np.broadcast_to(empty, shape) for k, (shape, _) in makers.items()}
    )
    path = folder / f"{name}.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", table)
        for i, (_, make) in enumerate(makers.values()):
            archive.writestr(f"archive/data/{i}", make().tobytes())
    return path


def write_h5(folder, name, files):
    """One of the two published sets of h5 files; {network: path}."""
    shapes = {}
    for keys in MODELS[name][1].values():
        shapes |= json.loads((synth.DATA / f"{keys}.json").read_text())
    paths = {}
    for part, file_name in files.items():
        paths[part] = folder / file_name
        rows = published("h5_layouts")[file_name]
        with h5py.File(paths[part], "w") as file:
            names = {}
            for weight, shape, key in rows:
                group, _, inside = weight.partition("/")
                names.setdefault(group, []).append(inside.encode())
                value = synth.weight(key, shapes[key])
                rank = value.ndim
                if rank == 2 and len(shape) == 4:
                    value = value[..., None, None]
                embedding = weight.endswith("embeddings:0")
                value = value.transpose(layouts.AXES[value.ndim, embedding])
                assert value.shape == tuple(shape)
                file.create_dataset(weight, data=value)
            file.attrs["layer_names"] = [group.encode() for group in names]
            for group, held in names.items():
                pieces = [held[i : i + 300] for i in range(0, len(held), 300)]
                for i, piece in enumerate(pieces):
                    attribute = f"weight_names{i}" if len(pieces) > 1 else "weight_names"
                    file[group].attrs[attribute] = piece
    return paths


KERAS = {
    "text_encoder": "text_encoder.h5",
    "unet": "diffusion_model.h5",
    "encoder": "encoder_newW.h5",
    "decoder": "decoder.h5",
}
KERAS_CV = {
    "text_encoder": "kcv_encoder.h5",
    "unet": "kcv_diffusion_model.h5",
    "encoder": "vae_encoder.h5",
    "decoder": "kcv_decoder.h5",
}
KERAS_CV_2 = KERAS_CV | {
    "text_encoder": "text_encoder_v2_1.h5",
    "unet": "diffusion_model_v2_1.h5",
}
WRITERS = {
    "folder": write_diffusers,
    "shards": write_shards,
    "safetensors": write_safetensors,
    "ckpt": write_ckpt,
    "keras": lambda folder, name: write_h5(folder, name, KERAS),
    "kerascv": lambda folder, name: write_h5(
        folder, name, KERAS_CV if name == "sd15" else KERAS_CV_2
    ),
}


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()


def check_unet(unet, name, bound=2e-5):
    golden = synth.golden(name)
    width = unet.config.context_width
    for i in range(sum(key.startswith("eps") for key in golden)):
        latents = synth.inputs(f"A{name}/latents{i}", golden[f"shape{i}"])
        context = synth.inputs(f"A{name}/context{i}", (len(latents), 77, width))
        noise = unet([latents, golden[f"timesteps{i}"], context])
        assert synth.relative_error(noise, golden[f"eps{i}"]) <= bound


def test_text_encoder(checkpoint):
    name, source, bound = checkpoint
    model = load_parts(source, ["text_encoder"])["text_encoder"]
    golden = synth.golden(f"{name}_text_encoder")
    assert synth.relative_error(model(golden["ids"]), golden["last_hidden_state"]) <= bound
    if name == "sd15":
        assert model.count_params() == PARAMETERS["text_encoder"]


def test_unet(checkpoint):
    name, source, bound = checkpoint
    model = load_parts(source, ["unet"])["unet"]
    check_unet(model, f"{name}_unet", bound)
    if name == "sd15":
        assert model.count_params() == PARAMETERS["unet"]


def test_autoencoder(checkpoint):
    _, source, bound = checkpoint
    golden = synth.golden("sd15_vae")
    encoder = load_parts(source, ["encoder"])["encoder"]
    images = np.tanh(synth.inputs("Asd15_vae/image", golden["image_shape"]))
    assert synth.relative_error(encoder(images), golden["moments"]) <= bound
    assert encoder.count_params() == PARAMETERS["encoder"]

    decoder = load_parts(source, ["decoder"])["decoder"]
    latents = synth.inputs("Asd15_vae/latents", golden["latents_shape"])
    scaled = latents * np.float32(decoder.config.scale)
    assert synth.relative_error(decoder(scaled), golden["decoded"]) <= bound
    assert decoder.count_params() == PARAMETERS["decoder"]


def test_inpainting_unet(tmp_path):
    keys = dict(json.loads((synth.DATA / "sd15_unet.json").read_text()))
    keys["conv_in.weight"] = (320, 9, 3, 3)
    path = tmp_path / "unet.safetensors"
    save_safetensors({key: synth.weight(key, shape) for key, shape in keys.items()}, path)
    checkpoint = open_checkpoint({"unet": path})
    assert checkpoint.config.unet == SD_1_INPAINT.unet
    check_unet(load_parts(checkpoint, ["unet"])["unet"], "sd15_inpaint_unet")
    path.unlink()
