"""Every layout gives every variable its own values; no backend is needed to see that."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import layouts
import numpy as np
import pytest
import synth
from tiny import FILES, TINY

from stable_diffusion_tf.checkpoints import fit
from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.compvis import tables
from stable_diffusion_tf.checkpoints.diffusers import TABLES
from stable_diffusion_tf.checkpoints.keras_h5 import InOrder
from stable_diffusion_tf.checkpoints.layouts import find_config
from stable_diffusion_tf.checkpoints.local import PARTS
from stable_diffusion_tf.checkpoints.readers import CheckpointError, save_safetensors
from stable_diffusion_tf.checkpoints.save import check_target
from stable_diffusion_tf.config import SD_1, SD_1_INPAINT, SD_2, SD_2_BASE

FILE_OF = {"text_encoder": "text_encoder", "unet": "unet", "encoder": "vae", "decoder": "vae"}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(fit, "BLOCK", 1000)


def check(checkpoint, weights, parts=PARTS):
    """Fills all variables, and finds in each what the reference has there."""
    for part in parts:
        variables = layouts.variables(part, weights[FILE_OF[part]])
        for match in checkpoint.match(part, variables):
            match.variable.value = match.read()
        for variable in variables:
            np.testing.assert_array_equal(variable.value, variable.expected, err_msg=variable.path)


class Named:
    """A file of which only names and shapes are known."""

    path = Path("file")

    def __init__(self, shapes):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    @property
    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return np.dtype(np.float32)


@pytest.mark.parametrize("functional", [False, True], ids=["earlier port", "KerasCV"])
def test_keras_files_are_told_by_their_content(tmp_path, tiny_weights, h5_at_once, functional):
    paths = layouts.write_keras(tmp_path / "h5", tiny_weights, functional)
    checkpoint = open_checkpoint(tmp_path / "h5", config=TINY)
    found = {part: match.keywords["file"].path for part, match in checkpoint.parts.items()}
    assert found == paths
    check(checkpoint, tiny_weights)

    alone = open_checkpoint({"decoder": paths["decoder"]}, config=TINY)
    check(alone, tiny_weights, ["decoder"])
    with pytest.raises(CheckpointError, match="has no unet, only decoder"):
        alone.match("unet", [])
    with pytest.raises(CheckpointError, match=r"3\.weights does not hold the unet, but decoder"):
        open_checkpoint({"unet": paths["decoder"]}, config=TINY)
    with pytest.raises(CheckpointError, match="no whole model: it holds decoder, and no text_enc"):
        open_checkpoint(paths["decoder"], config=TINY)
    with pytest.raises(ValueError, match="no network 'vae'; there are text_encoder, unet"):
        open_checkpoint({"vae": paths["decoder"]}, config=TINY)

    (tmp_path / "h5" / "again").write_bytes(paths["unet"].read_bytes())
    with pytest.raises(CheckpointError, match=r"the unet in 1\.weights and in again"):
        open_checkpoint(tmp_path / "h5", config=TINY)


def test_keras_files_that_do_not_fit_are_refused_by_weight(tmp_path, tiny_weights, h5_at_once):
    rows = list(layouts.keras_weights(tiny_weights["unet"], layouts.keras_unet(False)))
    path = tmp_path / "unet.h5"

    def problem(rows):
        layouts.write_h5(path, rows, functional=False)
        with pytest.raises(CheckpointError) as caught:
            variables = layouts.variables("unet", tiny_weights["unet"])
            open_checkpoint({"unet": path}, config=TINY).match("unet", variables)
        return str(caught.value)

    assert "1 tensor missing at its end: conv_out/bias" in problem(rows[:-1])
    assert "1 tensor not part of the model" in problem([*rows, ("extra", *rows[-1][1:])])
    layer, suffix, value = rows[0]
    assert "is transposed: (128, 32), the model needs (32, 128)" in problem(
        [(layer, suffix, value.T), *rows[1:]]
    )
    assert "layer_1/bias:0 is where time_embedding.linear_2/kernel should be" in problem(
        [*rows[:2], rows[3], rows[2], *rows[4:]]
    )


def test_keras_kernels_that_are_no_floats_are_refused(tmp_path, tiny_weights, h5_at_once):
    rows = list(layouts.keras_weights(tiny_weights["vae"], layouts.keras_decoder()))
    # a dense layer's kernel, stored as that of a 1x1 convolution
    i = next(i for i, (*_, w) in enumerate(rows) if w.shape == (1, 1, 64, 64))
    layer, suffix, value = rows[i]
    rows[i] = layer, suffix, value.astype(np.float64).view("V8")
    layouts.write_h5(tmp_path / "decoder.h5", rows, functional=False)
    variables = layouts.variables("decoder", tiny_weights["vae"])
    checkpoint = open_checkpoint({"decoder": tmp_path / "decoder.h5"}, config=TINY)
    with pytest.raises(CheckpointError, match=r"kernel:0 is \|V8, not floats"):
        checkpoint.match("decoder", variables)


def test_a_keras_file_of_one_weight_is_no_network(tmp_path, h5_at_once):
    path = tmp_path / "one.h5"
    layouts.write_h5(path, [("dense", "kernel", np.ones((1, 2, 3)))], functional=False)
    with pytest.raises(CheckpointError, match="no network of Stable Diffusion"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", [layouts.clip, layouts.open_clip], ids=["CLIP", "OpenCLIP"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_single_files_load(tmp_path, tiny_weights, text, kind):
    path = tmp_path / "model.weights"  # the name says nothing
    tensors = layouts.compvis(tiny_weights, text)
    if kind == "safetensors":
        save_safetensors(tensors, path)
    else:
        layouts.write_ckpt(path, tensors, old=kind == "legacy")
    checkpoint = open_checkpoint(path, config=TINY)
    check(checkpoint, tiny_weights)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "h5"])
def test_a_file_that_another_replaced_is_not_read(tmp_path, tiny_weights, h5_at_once, kind):
    path = tmp_path / "decoder"

    def write():
        if kind == "h5":
            rows = layouts.keras_weights(tiny_weights["vae"], layouts.keras_decoder())
            layouts.write_h5(path, rows, functional=False)
        elif kind == "safetensors":
            save_safetensors(tiny_weights["vae"], path)
        else:
            layouts.write_ckpt(path, tiny_weights["vae"], old=kind == "legacy")

    write()
    checkpoint = open_checkpoint({"decoder": path}, config=TINY)
    variables = layouts.variables("decoder", tiny_weights["vae"])
    path.rename(tmp_path / "before")
    write()
    assert path.stat().st_size == (tmp_path / "before").stat().st_size
    with pytest.raises(CheckpointError, match=r"decoder has changed .* Open the model again"):
        checkpoint.match("decoder", variables)[0].read()
    check(open_checkpoint({"decoder": path}, config=TINY), tiny_weights, ["decoder"])


def test_old_text_encoder_names_load(tmp_path, tiny_weights):
    tensors = {
        name.replace("transformer.text_model.", "transformer."): tensor
        for name, tensor in layouts.compvis(tiny_weights).items()
    }
    save_safetensors(tensors, tmp_path / "old")
    check(open_checkpoint(tmp_path / "old", config=TINY), tiny_weights)


def test_words_that_the_tokenizer_does_not_know_are_told_of_once(tiny_folder, tmp_path, caplog):
    file = tiny_folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 49410}))
    checkpoint = open_checkpoint(tiny_folder)
    open_checkpoint(checkpoint)
    check_target(tmp_path / "new", "float32", checkpoint.config)
    assert caplog.text.count("words beyond CLIP's") == caplog.text.count("its 2 words") == 1


def test_which_average_is_taken_is_said(tmp_path, tiny_weights, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "both.ckpt"
    average = {name: weight + 1 for name, weight in tiny_weights["unet"].items()}
    whole = layouts.compvis(tiny_weights)
    save_safetensors(whole | layouts.compvis_ema(average), path)
    check(open_checkpoint(path, config=TINY), tiny_weights)
    assert "the UNet's non-EMA weights are taken" in caplog.text
    check(open_checkpoint(path, config=TINY, ema=True), tiny_weights | {"unet": average})
    assert "the UNet's EMA weights are taken" in caplog.text

    save_safetensors(whole, path)
    with pytest.raises(CheckpointError, match="no moving average"):
        open_checkpoint(path, config=TINY, ema=True)
    alone = {n: w for n, w in whole.items() if not n.startswith("model.")}
    save_safetensors(alone | layouts.compvis_ema(average), path)
    check(open_checkpoint(path, config=TINY), tiny_weights | {"unet": average})


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_another_autoencoder_is_laid_over(tmp_path, tiny_weights, tiny_model, prefix):
    other = {name: weight * 2 for name, weight in tiny_weights["vae"].items()}
    save_safetensors(layouts.compvis_vae(other, prefix), tmp_path / "vae.pt")
    check(open_checkpoint(tiny_model, vae=tmp_path / "vae.pt"), tiny_weights | {"vae": other})

    folder = tmp_path / "vae"
    folder.mkdir()
    save_safetensors(other, folder / "diffusion_pytorch_model.safetensors")
    check(open_checkpoint(tiny_model, vae=folder), tiny_weights | {"vae": other})

    with pytest.raises(CheckpointError, match="no autoencoder: it holds unet"):
        open_checkpoint(tiny_model, vae=tiny_model / FILES["unet"])
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no diffusion_pytorch_model"):
        open_checkpoint(tiny_model, vae=folder)


def test_another_autoencoder_has_its_own_scale(tmp_path, tiny_model, tiny_folder):
    folder = tiny_folder / "vae"
    file = tiny_folder / FILES["vae"]
    config = json.loads((folder / "config.json").read_text())

    def opened(vae, **said):
        (folder / "config.json").write_text(json.dumps(config | said))
        return open_checkpoint(tiny_model, vae=vae).config

    other = replace(TINY, autoencoder=replace(TINY.autoencoder, scale=0.5))
    assert opened(folder, scaling_factor=0.5) == opened(file, scaling_factor=0.5) == other
    assert opened(file.rename(folder / "alone"), scaling_factor=0.5) == TINY
    (folder / "alone").rename(file)
    deeper = {key: config[key] * 2 for key in config if isinstance(config[key], list)}
    for said in ({"latent_channels": 8}, deeper):
        with pytest.raises(CheckpointError, match=r"config\.json: its latents .* needs 4 and 2"):
            opened(folder, **said)
    with pytest.raises(CheckpointError, match=r"config\.json: shift_factor = 0\.1 is not"):
        opened(folder, shift_factor=0.1)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_folders_with_pytorch_files_load(tiny_folder, tiny_weights, old):
    for part, name in FILES.items():
        path = tiny_folder / name
        path.unlink()
        stem = "pytorch_model" if part == "text_encoder" else path.stem
        layouts.write_ckpt(path.with_name(f"{stem}.bin"), tiny_weights[part], old)
    check(open_checkpoint(tiny_folder), tiny_weights)


def test_a_variant_is_taken_when_asked_for(tiny_folder, tiny_weights):
    half = {
        part: {name: w.astype(np.float16) for name, w in tensors.items()}
        for part, tensors in tiny_weights.items()
    }
    for part, name in FILES.items():
        path = tiny_folder / name
        if part != "unet":
            save_safetensors(half[part], path.with_suffix(".fp16.safetensors"))
            continue
        places = {name: f"shard{i % 2}" for i, name in enumerate(half[part])}
        for shard in set(places.values()):
            held = {name: half[part][name] for name in places if places[name] == shard}
            save_safetensors(held, path.with_name(shard))
        index = path.with_name(f"{path.name}.index.fp16.json")
        index.write_text(json.dumps({"weight_map": places}))
    check(open_checkpoint(tiny_folder, variant="fp16"), half)
    check(open_checkpoint(tiny_folder), tiny_weights)
    with pytest.raises(FileNotFoundError, match=r"model\.non_ema\.safetensors"):
        open_checkpoint(tiny_folder, variant="non_ema")


def test_a_variant_of_one_network_is_taken_with_the_others_plain_files(
    tiny_folder, tiny_weights, caplog
):
    average = {name: weight + 1 for name, weight in tiny_weights["unet"].items()}
    path = (tiny_folder / FILES["unet"]).with_suffix(".non_ema.safetensors")
    save_safetensors(average, path)
    check(open_checkpoint(tiny_folder, variant="non_ema"), tiny_weights | {"unet": average})
    assert f"'non_ema'; taken without: {FILES['text_encoder']}, {FILES['vae']}\n" in caplog.text

    (tiny_folder / FILES["vae"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusers layout: vae/\S+\.non_ema\.\S+ missing"):
        open_checkpoint(tiny_folder, variant="non_ema")


def test_an_option_without_a_meaning_is_refused(tmp_path, tiny_model, tiny_weights, h5_at_once):
    save_safetensors(layouts.compvis(tiny_weights), tmp_path / "file")
    by_network = layouts.write_keras(tmp_path / "h5", tiny_weights, functional=True)
    for source, option in (
        ("sd-v1-4-keras", "ema"),
        ("sd-v1-4-keras", "variant"),
        ("someone/model", "ema"),
        ("someone/model/file.ckpt", "variant"),
        (tiny_model, "ema"),
        (tmp_path / "file", "variant"),
        (tmp_path / "h5", "ema"),
        (tmp_path / "h5", "variant"),
        (by_network, "ema"),
        (by_network, "variant"),
        ({"unet": tiny_model / FILES["unet"]}, "ema"),
    ):
        with pytest.raises(ValueError, match=f"`{option}` means nothing for .* Leave it out"):
            open_checkpoint(source, config=TINY, **{option: "fp16"})


def shapes(context, channels):
    name = "model.diffusion_model."
    return Named(
        {
            f"{name}input_blocks.0.0.weight": (320, channels, 3, 3),
            f"{name}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context),
        }
    )


@pytest.mark.parametrize(
    ("file", "prediction", "config"),
    [
        (shapes(768, 4), None, SD_1),
        (shapes(768, 4), "v", SD_1),
        (shapes(768, 9), None, SD_1_INPAINT),
        (shapes(1024, 4), None, SD_2_BASE),
        (shapes(1024, 4), "v", SD_2),
        (shapes(1024, 9), None,
         replace(SD_2_BASE, name="stable-diffusion-v2-base-inpainting",
                 unet=replace(SD_2_BASE.unet, in_channels=9))),
        (Named({"x/layer/embeddings:0": (49408, 1024), "x/b:0": (3,)}), None, SD_2_BASE),
        (Named({"d/kernel:0": (320, 1280), "c/kernel:0": (3, 3, 4, 320), "k/kernel:0": (1024, 9)}),
         None, SD_2_BASE),
    ],
)  # fmt: skip
def test_the_model_is_told_by_the_tensors(file, prediction, config):
    assert find_config([file], prediction) == config


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (shapes(768, 5), "depth-to-image"),
        (shapes(768, 8), "InstructPix2Pix"),
        (shapes(2048, 4), "text of width 2048"),
    ],
)
def test_models_of_another_kind_are_named(file, message):
    with pytest.raises(CheckpointError, match=message):
        find_config([file], None)


SD_2_FILE = {  # enough to be taken for one
    "model.diffusion_model.input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), np.float16),
    "first_stage_model.quant_conv.bias": np.zeros(8, np.float16),
    "cond_stage_model.model.token_embedding.weight": np.zeros((2, 1024), np.float16),
}


def test_what_is_predicted_is_said_by_a_config_or_the_caller(tmp_path):
    path = tmp_path / "768-v-ema.safetensors"
    save_safetensors(SD_2_FILE, path)

    def prediction(**options):
        return open_checkpoint(path, **options).config.schedule.prediction

    assert prediction() == "epsilon"
    assert prediction(prediction="v") == "v"
    config = path.with_suffix(".yaml")
    for said, expected in (("eps", "epsilon"), ("v", "v")):
        config.write_text(f'model:\n  params:\n    parameterization: "{said}"\n')
        assert prediction() == expected
    assert prediction(prediction="epsilon") == "epsilon"
    # The file itself comes before what lies beside it, in ModelSpec's words or in diffusers'.
    for said, expected in (("v", "v"), ("v_prediction", "v"), ("epsilon", "epsilon")):
        save_safetensors(SD_2_FILE, path, {"modelspec.prediction_type": said})
        assert prediction() == expected
    assert prediction(config=SD_2) == "v"  # the caller's config before what the file says
    assert prediction(config=SD_2, prediction="epsilon") == "epsilon"
    with pytest.raises(ValueError, match="'epsilon' or 'v', not 'sample'"):
        prediction(prediction="sample")


def test_an_assumed_prediction_is_said(tmp_path, caplog):
    path = tmp_path / "file"
    save_safetensors(SD_2_FILE, path)

    def warnings(source=path, **options):
        caplog.clear()
        open_checkpoint(source, **options)
        return caplog.text.count(f"{path}: nothing says what this model of Stable Diffusion 2")

    assert warnings() == warnings({"unet": path, "text_encoder": path}) == 1
    assert warnings(prediction="v") == warnings(prediction="epsilon") == 0
    assert warnings(config=SD_2) == warnings({"text_encoder": path}) == 0


@pytest.mark.parametrize("source", ["emoji", "sd-v1-4-keras", "someone/model", "folder", "opened"])
def test_a_config_is_only_for_files_without_one(tiny_model, source):
    opened = open_checkpoint(tiny_model)
    source = {"folder": tiny_model, "opened": opened}.get(source, source)
    for config in (TINY, replace(TINY, guidance=1.0)):
        with pytest.raises(ValueError, match=r"`config` means nothing for .* without a config"):
            open_checkpoint(source, config=config)


UNET = "model.diffusion_model."


def wrong(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_safetensors({name: np.zeros(shape, np.float32) for name, shape in content}, path)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>" + b" " * 99, "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"", "is empty"),
        (b'{"error": "gone"}', "weight_map"),
        (b"nothing that anyone knows", "no file of weights"),
        (b"\x80\x04\x95", "Python pickle|damaged"),
        (b"PK\x03\x04" + bytes(30), "zip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "damaged"),
        ([("conditioner.embedders.0.transformer.x", 1)], "Stable Diffusion XL"),
        ([(f"{UNET}input_blocks.4.1.transformer_blocks.1.x", 1)], "Stable Diffusion XL"),
        ([("down_blocks.1.attentions.0.transformer_blocks.1.x", 1)], "Stable Diffusion XL"),
        ([("conditioner.x", 1), (f"{UNET}label_emb.0.0.weight", 1)], "Stable Diffusion XL"),
        ([("conditioner.x", 1), (f"{UNET}input_blocks.1.1.time_stack.x", 1)], "a video model"),
        ([(f"{UNET}label_emb.weight", 1)], "the x4 upscaler"),
        ([("class_embedding.weight", 1), ("down_blocks.0.x", 1)], "the x4 upscaler"),
        ([(f"{UNET}label_emb.0.0.weight", 1)], "unCLIP"),
        ([("class_embedding.linear_1.weight", 1), ("down_blocks.0.x", 1)], "unCLIP"),
        ([("lora_unet_down_blocks_0.alpha", 1)], "a LoRA"),
        ([("unet.down_blocks.0.attn1.to_q.lora.up.weight", 1)], "a LoRA"),
        ([("unet.down_blocks.0.attn1.processor.to_q_lora.up.weight", 1)], "a LoRA"),
        ([("encoder.layers.0.weight", 1), ("encoder.layers.1.conv.0.weight", 1)], "TAESD"),
        ([("emb_params", 1)], "a textual inversion"),
        ([("control_model.input_blocks.0.0.weight", 1)], "a ControlNet"),
        ([("model.diffusion_model.joint_blocks.0.x", 1)], "a diffusion transformer"),
        ([("layer.weight", 1)], "no network of Stable Diffusion"),
        ([("down_blocks.0.resnets.0.norm1.weight", 1)], "it holds unet, and no text_encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_files_are_named_for_what_they_are(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(wrong(tmp_path, content))


def test_a_folder_without_a_model_is_named(tmp_path):
    wrong(tmp_path, [("lora_a", 1)])
    with pytest.raises(CheckpointError, match=r"without a model.*Give a file: model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_part_of_a_model_names_the_whole(tiny_folder):
    with pytest.raises(CheckpointError, match=rf"It is a part of {tiny_folder}; give that\.$"):
        open_checkpoint(tiny_folder / "vae")


def test_another_model_s_folder_gives_its_autoencoder(tiny_folder, tiny_model):
    whole, its_own = (
        open_checkpoint(tiny_model, vae=folder) for folder in (tiny_folder, tiny_folder / "vae")
    )
    assert whole.config == its_own.config
    assert set(whole.parts) == {"text_encoder", "unet", "encoder", "decoder"}


def test_one_error_lists_all_that_is_wrong_with_a_single_file(tmp_path, tiny_weights):
    tensors = layouts.compvis(tiny_weights)
    del tensors["model.diffusion_model.out.2.bias"]
    tensors["model.diffusion_model.time_embed.0.weight"] = np.zeros((32, 128), np.float32)
    tensors["surprise"] = np.zeros(1, np.float32)
    save_safetensors(tensors, tmp_path / "bad")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "bad", config=TINY).match(
            "unet", layouts.variables("unet", tiny_weights["unet"])
        )
    for expected in (
        "1 tensor missing: model.diffusion_model.out.2.bias",
        "1 tensor not part of the model: surprise",
        "time_embed.0.weight is transposed: (32, 128), the model needs (128, 32)",
    ):
        assert expected in str(caught.value)


def published_lists(name):
    return json.loads(gzip.decompress((synth.DATA / f"{name}.json.gz").read_bytes()))


H5 = {
    "text_encoder.h5": ("text_encoder", "sd15_text_encoder"),
    "diffusion_model.h5": ("unet", "sd15_unet"),
    "decoder.h5": ("decoder", "sd15_vae"),
    "encoder_newW.h5": ("encoder", "sd15_vae"),
    "kcv_encoder.h5": ("text_encoder", "sd15_text_encoder"),
    "kcv_diffusion_model.h5": ("unet", "sd15_unet"),
    "kcv_decoder.h5": ("decoder", "sd15_vae"),
    "vae_encoder.h5": ("encoder", "sd15_vae"),
    "text_encoder_v2_1.h5": ("text_encoder", "sd21_text_encoder"),
    "diffusion_model_v2_1.h5": ("unet", "sd21_unet"),
}


@pytest.mark.parametrize("name", H5)
def test_published_keras_files_map_weight_by_weight(name):
    part, keys = H5[name]
    rows = published_lists("h5_layouts")[name]
    variables = layouts.variables(part, layouts.published(keys))
    matches = InOrder().match(variables, Named({weight: shape for weight, shape, _ in rows}))
    names = {match.name: TABLES[part].tensor(match.variable)[0] for match in matches}
    assert names == {weight: key for weight, _, key in rows}


@pytest.mark.parametrize(("part", "keys"), list(H5.values())[:4])
def test_published_single_files_map_tensor_by_tensor(part, keys):
    rows = published_lists("compvis_keys")[{"unet": "diffusion_model"}.get(part, part)]
    table = tables(SD_1, Named(dict.fromkeys((theirs for theirs, _ in rows), ())))[part]
    names = {
        table.tensor(v)[0]: TABLES[part].tensor(v)[0]
        for v in layouts.variables(part, layouts.published(keys))
    }
    assert names == dict(rows)
