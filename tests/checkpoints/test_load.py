import json
import subprocess
import sys
from dataclasses import replace

import keras
import layouts
import ml_dtypes
import numpy as np
import pytest
import synth
from tiny import FILES, TINY

from stable_diffusion_tf.checkpoints import catalog, fit
from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.fit import Match
from stable_diffusion_tf.checkpoints.hub import DownloadError
from stable_diffusion_tf.checkpoints.load import MODELS, load, load_parts
from stable_diffusion_tf.checkpoints.readers import (
    CheckpointError,
    SafetensorsFile,
    save_safetensors,
)
from stable_diffusion_tf.compile import from_numpy


def rewrite(folder, part, tensors):
    save_safetensors(tensors, folder / FILES[part])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_part(source, part, dtype=None):
    return load_parts(source, [part], dtype)[part]


def same_weights(one, other):
    return all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(one.weights, other.weights, strict=True)
    )


def test_a_loaded_model_computes_what_the_reference_does(tiny_folder):
    models = load(tiny_folder)
    assert models.config == TINY

    text = synth.golden("tiny_text_encoder")
    states = models.text_encoder(text["ids"])
    assert synth.relative_error(states, text["last_hidden_state"]) <= 2e-5
    states = models.text_encoder.skipping(2)(text["ids"])
    assert synth.relative_error(states, text["skip2_then_final_norm"]) <= 2e-5

    unet = synth.golden("tiny_unet")
    latents = synth.inputs("Atiny_unet/latents0", unet["shape0"])
    context = synth.inputs("Atiny_unet/context0", (2, 77, 32))
    noise = models.unet([latents, unet["timesteps0"], context])
    assert synth.relative_error(noise, unet["eps0"]) <= 2e-5

    vae = synth.golden("tiny_vae")
    moments = models.encoder(np.tanh(synth.inputs("Atiny_vae/image", vae["image_shape"])))
    assert synth.relative_error(moments, vae["moments"]) <= 2e-5
    latents = synth.inputs("Atiny_vae/latents", vae["latents_shape"])
    images = models.decoder(latents * np.float32(TINY.autoencoder.scale))
    assert synth.relative_error(images, vae["decoded"]) <= 2e-5


@pytest.mark.parametrize("part", MODELS)
def test_each_part_loads_by_itself(tiny_folder, part):
    checkpoint = open_checkpoint(tiny_folder)
    assert same_weights(load_part(checkpoint, part), load_part(tiny_folder, part))


def test_old_names_and_layouts_are_the_same_model(tiny_folder, tiny_weights):
    today = load_part(tiny_folder, "text_encoder"), load_part(tiny_folder, "encoder")

    text = {n.removeprefix("text_model."): w for n, w in tiny_weights["text_encoder"].items()}
    text["embeddings.position_ids"] = np.arange(77)[None]
    text["text_projection.weight"] = np.eye(32, dtype=np.float32)
    rewrite(tiny_folder, "text_encoder", text)

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for name, weight in tiny_weights["vae"].items():
        for new_name, old_name in old.items():
            if f".attentions.0.{new_name}." in name:
                name = name.replace(new_name, old_name)
                weight = weight[..., None, None] if weight.ndim == 2 else weight
        vae[name] = weight
    rewrite(tiny_folder, "vae", vae)

    assert same_weights(load_part(tiny_folder, "text_encoder"), today[0])
    assert same_weights(load_part(tiny_folder, "encoder"), today[1])


@pytest.mark.parametrize("layout", ["CompVis", "Keras", "KerasCV"])
def test_other_layouts_are_the_same_model(tmp_path, tiny_model, tiny_weights, layout):
    if layout == "CompVis":
        path = tmp_path / "model.ckpt"
        layouts.write_ckpt(path, layouts.compvis(tiny_weights))
    else:
        path = layouts.write_keras(tmp_path / "h5", tiny_weights, functional=layout == "KerasCV")
    expected = load(tiny_model)
    found = load_parts(open_checkpoint(path, config=TINY), MODELS)
    for part, model in found.items():
        assert same_weights(model, getattr(expected, part))


def test_shards_and_half_precision_files_load(tiny_folder, tiny_weights):
    whole = load_part(tiny_folder, "unet")
    names = list(tiny_weights["unet"])
    places = {name: f"shard{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: tiny_weights["unet"][name] for name in names if places[name] == shard}
        save_safetensors(held, tiny_folder / "unet" / shard)
    path = tiny_folder / FILES["unet"]
    path.unlink()
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": places}))
    assert same_weights(load_part(tiny_folder, "unet"), whole)

    path = tiny_folder / FILES["vae"]
    path.unlink()
    halves = {name: w.astype(np.float16) for name, w in tiny_weights["vae"].items()}
    save_safetensors(halves, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    decoder = load_part(tiny_folder, "decoder")
    kernel = halves["post_quant_conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(decoder.get_layer("post_quant_conv").kernel, kernel)


@pytest.mark.parametrize("dtype", ["float16", "mixed_bfloat16"])
def test_weights_are_converted_to_the_model_s_dtype(tiny_folder, tiny_weights, dtype):
    bfloat16 = {n: w.astype(ml_dtypes.bfloat16) for n, w in tiny_weights["vae"].items()}
    rewrite(tiny_folder, "vae", bfloat16)
    bias = load_part(tiny_folder, "encoder", dtype=dtype).get_layer("quant_conv").bias
    assert bias.dtype == {"float16": "float16", "mixed_bfloat16": "float32"}[dtype]
    np.testing.assert_array_equal(bias, bfloat16["quant_conv.bias"].astype(bias.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_read_tensor_is_a_variables_memory(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(fit, "BLOCK", 4000)  # 33 rows, 33 more, and the last 4
    stored = np.random.default_rng(0).standard_normal((70, 3, 2, 5), np.float32)
    save_safetensors({"weight": stored}, tmp_path / "weights.safetensors")
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    variable = keras.Variable(np.zeros((2, 5, 3, 70)), dtype=dtype)
    value = Match(variable, file, "weight", stored.shape, (2, 3, 1, 0)).read()
    np.testing.assert_array_equal(value, stored.transpose(2, 3, 1, 0).astype(dtype))
    tensor = from_numpy(value)
    assert keras.backend.standardize_dtype(tensor.dtype) == dtype
    value[0, 0, 0, 0] = 7  # as only a test may
    assert float(tensor[0, 0, 0, 0]) == 7


def test_one_error_lists_all_that_does_not_fit(tiny_folder, tiny_weights):
    unet = dict(tiny_weights["unet"])
    unet["conv_in.weight"] = np.zeros((32, 9, 3, 3), np.float32)
    unet["conv_out.bias"] = np.zeros(4, np.int32)
    unet["surprise.weight"] = unet.pop("conv_out.weight")
    for name in [name for name in unet if name.startswith("mid_block.resnets.0.")]:
        del unet[name]
    rewrite(tiny_folder, "unet", unet)
    vae = dict(tiny_weights["vae"])
    del vae["decoder.conv_in.bias"]
    rewrite(tiny_folder, "vae", vae)

    with pytest.raises(CheckpointError) as caught:
        load(tiny_folder)
    message = str(caught.value)
    for expected in (
        "unet/diffusion_pytorch_model.safetensors does not fit its config",
        "11 tensors missing: mid_block.resnets.0.norm1.weight",
        "…",
        "1 tensor not part of the model: surprise.weight",
        "conv_in.weight is (32, 9, 3, 3), the model needs (32, 4, 3, 3)",
        "conv_out.bias is int32, not floats",
        "1 tensor missing: decoder.conv_in.bias",
        "Take the config and the weights from the same checkpoint",
    ):
        assert expected in message


def test_a_tensor_with_two_names_is_left_over(tiny_folder, tiny_weights):
    text = dict(tiny_weights["text_encoder"])
    text["final_layer_norm.bias"] = text["text_model.final_layer_norm.bias"]
    rewrite(tiny_folder, "text_encoder", text)
    with pytest.raises(CheckpointError, match=r"not part of the model: \S*final_layer_norm\.bias"):
        load_part(tiny_folder, "text_encoder")


def nothing_is_left(variables):
    """No variable has a value; nor does one get it at the end of Keras's next scope."""
    with keras.StatelessScope():
        pass
    return all(variable._value is None for variable in variables)


def test_what_cannot_be_fetched_costs_no_memory(tiny_folder):
    asked = []

    def fails(variables):
        asked.extend(variables)
        raise DownloadError("no network")

    checkpoint = open_checkpoint(tiny_folder)
    broken = replace(checkpoint, parts={**checkpoint.parts, "decoder": fails})
    with pytest.raises(DownloadError, match="no network"):
        load_parts(broken, ["encoder", "decoder"])
    assert asked
    assert nothing_is_left(asked)
    load_part(checkpoint, "decoder")


def test_fetching_is_not_inside_keras_s_scope(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)

    def match(variables):
        keras.Variable(np.zeros(2))  # which is an error in the scope
        return checkpoint.match("decoder", variables)

    load_part(replace(checkpoint, parts={"decoder": match}), "decoder")


@pytest.mark.parametrize("error", [ValueError, OverflowError, OSError])
def test_a_tensor_that_cannot_be_read_is_named(tiny_folder, monkeypatch, error):
    asked = []
    checkpoint = open_checkpoint(tiny_folder)

    def match(variables):
        asked.extend(variables)
        return checkpoint.match("decoder", variables)

    def fails(file, name, rows):
        raise error("too odd")

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFile, "read", fails)
        with pytest.raises(CheckpointError, match=r"safetensors: .*conv.* cannot be read: too odd"):
            load_part(replace(checkpoint, parts={"decoder": match}), "decoder")
    assert nothing_is_left(asked)
    load_part(checkpoint, "decoder")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(tiny_folder, tiny_weights, bad):
    vae = dict(tiny_weights["vae"])
    vae["decoder.conv_in.bias"] = np.full(64, bad, np.float32)
    rewrite(tiny_folder, "vae", vae)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias has NaN or infinite"):
        load_part(tiny_folder, "decoder")


def test_overflow_of_the_model_s_dtype_is_named(tiny_folder, tiny_weights):
    vae = dict(tiny_weights["vae"])
    vae["decoder.conv_in.bias"] = np.full(64, 1e6, np.float32)
    rewrite(tiny_folder, "vae", vae)
    load_part(tiny_folder, "decoder")
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias is too large for float16"):
        load_part(tiny_folder, "decoder", dtype="float16")


def test_what_float32_cannot_hold_is_not_to_be_loaded_as_it(tmp_path):
    save_safetensors({"weight": np.full(3, 1e300)}, tmp_path / "weights.safetensors")
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    variable = keras.Variable(np.zeros(3), dtype="float32")
    with pytest.raises(CheckpointError, match=r"weight is too large for float32\.$"):
        Match(variable, file, "weight", (3,), (0,)).read()


def test_a_number_that_is_not_finite_is_found_in_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "BLOCK", 20)
    stored = np.ones((7, 5), np.float32)
    stored[0, 0], stored[6, 4] = 1e6, np.nan  # what float32 would mend, and what it would not
    save_safetensors({"weight": stored}, tmp_path / "weights.safetensors")
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    for dtype in ("float32", "float16"):
        variable = keras.Variable(np.zeros((7, 5)), dtype=dtype)
        with pytest.raises(CheckpointError, match="weight has NaN or infinite"):
            Match(variable, file, "weight", (7, 5), (0, 1)).read()


def test_missing_files_are_all_named(tiny_folder):
    (tiny_folder / "unet/config.json").unlink()
    (tiny_folder / FILES["vae"]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        open_checkpoint(tiny_folder)
    for expected in (
        str(tiny_folder),
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors missing; download the whole folder",
    ):
        assert expected in str(caught.value)


def test_truncated_weights_are_refused_on_opening(tiny_folder):
    path = tiny_folder / FILES["unet"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"unet.*is truncated"):
        open_checkpoint(tiny_folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("emojis", r"Unknown weights 'emojis'.*preset \(emoji, sd-v1-4-keras, "),
        ("./someone/some-model", "no folder or file, and no name of a repository"),
        ("", "Unknown weights"),
    ],
)
def test_an_unknown_source_lists_what_is_known(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(source)


def test_opening_a_checkpoint_needs_no_backend():
    code = "import sys, stable_diffusion_tf.checkpoints.catalog\nsys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_presets_are_found_in_a_clone_and_in_a_wheel(tmp_path, tiny_folder, monkeypatch):
    package = tmp_path / "site" / "stable_diffusion_tf"
    package.mkdir(parents=True)
    monkeypatch.setattr(catalog.resources, "files", lambda name: package)
    with pytest.raises(CheckpointError, match="missing from this installation"):
        open_checkpoint("emoji")

    for parent in (package.parent, package):
        (parent / "weights").mkdir()
        (parent / "weights" / "emoji").symlink_to(tiny_folder)
        checkpoint = open_checkpoint("emoji")
        assert (
            checkpoint.parts["unet"].keywords["file"].path
            == parent / "weights" / "emoji" / FILES["unet"]
        )


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXL"),
        ("model_index.json", {"_stable_diffusion_tf": {"guidance": None}}, "finite guidance"),
        ("model_index.json", {"_stable_diffusion_tf": {"guidance": 10**400}}, "finite guidance"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_t"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 10]}, "transformer_layers"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "X"]}, "down_block_types"),
        ("unet/config.json", {"down_block_types": None}, "down_block_types"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 2}, "the mirror"),
        ("unet/config.json", {"block_out_channels": [32, -64]}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [32, 48]}, "norm_num_groups"),
        ("unet/config.json", {"attention_head_dim": [4]}, "attention_head_dim"),
        ("unet/config.json", {"attention_head_dim": 7}, "a number of heads that divides"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, "same number at every level"),
        ("unet/config.json", {"cross_attention_dim": 64}, "text encoder's hidden_size 32"),
        ("unet/config.json", {"in_channels": 5}, "4, or 9 for inpainting"),
        ("unet/config.json", {"out_channels": 8}, "latent_channels 4"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size = '64'"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
        ("vae/config.json", {"scaling_factor": 0}, "a positive number is"),
        ("vae/config.json", {"scaling_factor": 10**400}, "a positive number is"),
        ("vae/config.json", {"layers_per_block": 10**9}, "an integer from 1 to 64 is"),
        ("unet/config.json", {"layers_per_block": 10**4}, "64 at most, is"),
        ("unet/config.json", {"block_out_channels": [32] * 9}, "of 1 to 8 levels, is"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "an integer from 1 to 64 is"),
        ("vae/config.json", {"down_block_types": ["AttnDown", "AttnDown"]}, "down_block_types"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type = 't5'"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "divisor of hidden_size"),
        ("text_encoder/config.json", {"vocab_size": 1000}, "an integer from 49408 to 65536 is"),
        (
            "text_encoder/config.json",
            {"max_position_embeddings": 2},
            "an integer from 3 to 65536 is",
        ),
        ("tokenizer/special_tokens_map.json", {"pad_token": "[PAD]"}, r"pad_token = '\[PAD\]'"),
        ("tokenizer/special_tokens_map.json", {"pad_token": ["!"]}, r"pad_token = \['!'\]"),
        ("tokenizer/special_tokens_map.json", {"pad_token": {"content": {}}}, "pad_token = {'c"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"beta_start": -1e-4}, "a positive number below 1 is"),
        ("scheduler/scheduler_config.json", {"beta_end": 5}, "a positive number below 1 is"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "'linear' or 'scaled_l"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny_folder, file, changes, message):
    edit_json(tiny_folder / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tiny_folder)
    assert file in str(caught.value)


@pytest.mark.filterwarnings("ignore:__array__")  # Keras's, in saving
@pytest.mark.parametrize("name", ["decoder.weights.h5", "decoder.keras"])
def test_keras_3_s_own_files_are_named_and_the_way_round_them(tmp_path, name):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    save = model.save_weights if name.endswith(".h5") else model.save
    save(tmp_path / name)
    message = rf"{name} is of Keras 3's own format.* `load_weights`; .*save_pretrained"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint({"decoder": tmp_path / name})


def test_an_opened_checkpoint_is_taken_as_it_is(tiny_model):
    checkpoint = open_checkpoint(tiny_model)
    assert open_checkpoint(checkpoint) is checkpoint
    changed = open_checkpoint(checkpoint, prediction="v")
    assert (changed.config.schedule.prediction, changed.parts) == ("v", checkpoint.parts)
    with pytest.raises(ValueError, match="`ema` means nothing for an opened checkpoint"):
        open_checkpoint(checkpoint, ema=True)


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("emoji", False),
        ("sd-v1-4-keras", True),
        ("someone/some-model", True),
        ("someone/some-model/file.ckpt", True),
        ("a/folder", False),
        ("a/fodler", False),
        ("a/fodler/file.ckpt", False),
        ("../some-model", False),
        ("", False),
    ],
)
def test_what_is_on_a_hub(tmp_path, monkeypatch, source, there):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "folder").mkdir(parents=True)
    assert catalog.is_on_hub(source) == there
