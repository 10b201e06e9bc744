import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import click
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny import FILES, TINY

from stable_diffusion_tf import CheckpointError, StableDiffusion
from stable_diffusion_tf.checkpoints import hub
from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.cli import main
from stable_diffusion_tf.cli.draw import slug
from stable_diffusion_tf.cli.repeat import Setting
from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import, with_options
from stable_diffusion_tf.images import free_path, save_png
from stable_diffusion_tf.networks import Networks
from stable_diffusion_tf.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_one_png_a_picture_and_its_path_printed(sdtf, tmp_path):
    result = sdtf("a cat", "A dog!", "--batch", "2", "--steps", "2", "--seed", "7")
    assert result.exit_code == 0, result.output
    paths = ["a-cat.png", "a-cat-1.png", "a-dog.png", "a-dog-1.png"]
    assert result.stdout.split() == [f"outputs/{path}" for path in paths]
    for seed, path in enumerate(paths, start=7):
        assert f"seed {seed}\n" in result.stderr
        assert pixels(tmp_path / "outputs" / path).shape == (32, 32, 3)
    assert sorted(os.listdir(tmp_path / "outputs")) == sorted(paths)


def test_pictures_are_those_of_generate(sdtf, tiny_model):
    sdtf("a cat", "a dog", "--steps", "2", "--seed", "7", "--negative", "blue", "--quiet")
    sd = StableDiffusion.from_pretrained(tiny_model)
    cat, dog = sd.generate(["a cat", "a dog"], "blue", num_steps=2, seed=7, progress=False)
    for found, expected in (("a-cat", cat), ("a-dog", dog)):
        difference = pixels(f"outputs/{found}.png").astype(int) - expected
        assert abs(difference).max() <= 1  # rounded, alone and in a batch


def test_pictures_are_drawn_over_pictures(sdtf, tiny_model):
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:20] = 255
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    arguments = ["--image", "photo.png", "--strength", "0.6", "--steps", "5", "--seed", "7"]
    result = sdtf("a cat", *arguments, "--mask", "mask.png", "--feather", "2")
    assert result.exit_code == 0, result.output
    sdtf("a dog", *arguments)

    settings = {"num_steps": 5, "seed": 7, "input_image": photo, "input_image_strength": 0.6}
    sd = StableDiffusion.from_pretrained(tiny_model)
    (cat,) = sd.generate("a cat", input_mask=mask, mask_feather=2, progress=False, **settings)
    (dog,) = sd.generate("a dog", progress=False, **settings)
    np.testing.assert_array_equal(pixels("outputs/a-cat.png"), cat)
    np.testing.assert_array_equal(pixels("outputs/a-dog.png"), dog)
    made = json.loads(text_of("outputs/a-cat.png")["stable_diffusion_tf"])
    assert (made["input_image"], made["input_mask"]) == ("photo.png", "mask.png")
    assert (made["input_image_strength"], made["mask_feather"]) == (0.6, 2.0)


def text_of(path):
    with Image.open(path) as image:
        return image.text


def test_the_png_says_how_it_was_drawn(sdtf, tiny_model):
    choices = ("--sampler", "dpmpp_2m", "--karras", "--clip-skip", "2", "--rng", "torch")
    arguments = ("a (cat)", "--steps", "3", "--size", "20x14", "--literal", "--batch", "2")
    first = sdtf(*arguments, *choices)
    text = text_of("outputs/a-cat-1.png")
    made = json.loads(text["stable_diffusion_tf"])
    seed = made["seed"]
    assert f"seed {seed}\n" in first.stderr
    hashes = {
        part: hashlib.sha256((tiny_model / file).read_bytes()).hexdigest()
        for part, file in FILES.items()
    }
    assert made == {
        "prompt": "a (cat)",
        "seed": seed,
        "negative_prompt": None,
        "emphasis": False,
        "clip_skip": 2,
        "num_steps": 3,
        "reuse": 1,
        "unconditional_guidance_scale": 3.0,
        "rng": "torch",
        "size": "20x14",
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "eta": 0.0,
        "guidance_rescale": 0.0,
        "input_image": None,
        "input_mask": None,
        "input_image_strength": 0.5,
        "mask_feather": 0.0,
        "weights": str(tiny_model),
        "vae": None,
        "prediction": None,
        "dtype": "float32",
        "jit_compile": False,
        "engine": None,
        "facts": {
            "version": version("stable-diffusion-tf"),
            "backend": keras.backend.backend(),
            "model": "tiny",
            "config_sha256": hashlib.sha256(repr(replace(TINY, name="")).encode()).hexdigest(),
            "text_encoder_sha256": hashes["text_encoder"],
            "unet_sha256": hashes["unet"],
            "decoder_sha256": hashes["vae"],
            "batch_seeds": [seed - 1, seed],
        },
    }
    assert text["parameters"].splitlines()[0] == "a (cat)"
    assert (
        f"Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3, Seed: {seed}, "
        in text["parameters"]
    )
    model_hash = hashes["unet"][:10]
    assert f"Model hash: {model_hash}, Model: tiny, Clip skip: 2, " in text["parameters"]


def test_what_is_used_is_hashed_once_and_before_the_first_picture(sdtf, tiny_model, monkeypatch):
    events = []
    computed, drawn = hub._hash, Networks.decode
    monkeypatch.setattr(
        hub, "_hash", lambda path, **like: events.append(path) or computed(path, **like)
    )
    monkeypatch.setattr(Networks, "decode", lambda *given: events.append("drawn") or drawn(*given))
    Image.new("RGB", (32, 32)).save("photo.png")
    sdtf("a cat", "a dog", "--image", "photo.png", "--steps", "2")
    files = [Path("photo.png"), *(tiny_model / file for file in FILES.values())]
    assert events == [*files, "drawn", "drawn"]


def test_shards_are_hashed_and_not_their_index(sdtf, tiny_folder, tiny_weights):
    path = tiny_folder / FILES["unet"]
    places = {name: f"shard{i % 2}" for i, name in enumerate(tiny_weights["unet"])}
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": places}))
    made = set()
    for sign in (1, -1):  # two models with the same index
        for shard in sorted(set(places.values())):
            held = [name for name in places if places[name] == shard]
            tensors = {name: sign * tiny_weights["unet"][name] for name in held}
            save_safetensors(tensors, path.with_name(shard))
        picture = sdtf("a cat", "--steps", "1", "--quiet", weights=tiny_folder).stdout.strip()
        made.add(json.loads(text_of(picture)["stable_diffusion_tf"])["facts"]["unet_sha256"])
    assert len(made) == 2


def test_settings_are_named_as_the_api_s_parameters():
    api = signature(StableDiffusion.generate).parameters.keys()
    model = {"weights", "vae", "prediction", "dtype", "jit_compile", "engine", "size"}
    options = {
        option.name for option in main.commands["generate"].params if type(option) is Setting
    }
    assert options - model <= api
    # What the command line leaves to others: arrays, functions, and what is no part of the picture.
    assert api - options <= {
        "self", "prompt", "batch_size", "temperature", "context", "negative_context",
        "diffusion_noise", "sample_posterior", "output", "progress", "callback",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_picture_s_name_may_be_any_bytes(sdtf):
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (16, 16)).save(name)
    result = sdtf("a cat", "--image", name, "--steps", "1")
    assert result.exit_code == 0, result.output
    made = json.loads(text_of("outputs/a-cat.png")["stable_diffusion_tf"])
    assert made["input_image"] == "caf\ufffd.png"


@pytest.mark.skipif(sys.platform == "win32", reason="names there have no limit of bytes")
def test_the_longest_name_can_be_written(tmp_path):
    for _ in range(2):
        path = free_path(tmp_path, slug("\U00020000" * 100))
        save_png(np.zeros((2, 2, 3), np.uint8), path)
    assert len(os.listdir(tmp_path)) == 2


def test_a_grid_shows_all_pictures_and_overwrites_none(sdtf):
    choices = ("--steps", "1", "--batch", "3", "--seed", "7", "--grid", "--quiet")
    paths = sdtf("a cat", "a dog", *choices).stdout.split()
    assert len(paths) == 7 and paths[-1] == "outputs/grid.png"
    sheet = pixels("outputs/grid.png")
    assert sheet.shape[1] == 3 * (4 * 32 + 4) + 4  # a row a prompt, enlarged for the labels
    np.testing.assert_array_equal(sheet[4 : 4 + 128 : 4, 4 : 4 + 128 : 4], pixels(paths[0]))
    assert sdtf("a cat", *choices).stdout.split()[-1] == "outputs/grid-1.png"


def test_pictures_are_kept_for_a_grid_only(sdtf, monkeypatch):
    drawn, made, kept = StableDiffusion.generate, [], []

    def generate(*args, **settings):
        kept.append(sum(picture() is not None for picture in made))
        pictures = drawn(*args, **settings)
        made.append(weakref.ref(pictures))
        return pictures

    monkeypatch.setattr(StableDiffusion, "generate", generate)
    sdtf("a", "b", "c", "--steps", "1")
    assert kept == [0, 1, 1]  # the last one


def test_prompts_of_a_file_come_after_those_given(sdtf, tmp_path):
    (tmp_path / "more.txt").write_text("\ufeffa dog\n\n  a café  \r\n", encoding="utf-8")
    settings = ("--steps", "1", "--seed", "7")
    result = sdtf("a cat", "--prompts-file", "more.txt", *settings)
    assert result.exit_code == 0, result.output
    names = ["a-cat", "a-dog", "a-café"]
    assert result.stdout.split() == [f"outputs/{name}.png" for name in names]
    assert [f"seed {seed}" in result.stderr for seed in (7, 8, 9, 10)] == [True, True, True, False]
    assert json.loads(text_of("outputs/a-café.png")["stable_diffusion_tf"])["seed"] == 9
    sdtf("--prompts-file", "more.txt", "--quiet", *settings)
    assert (tmp_path / "outputs" / "a-dog-1.png").exists()


def test_quiet_leaves_the_paths_only(sdtf):
    result = sdtf("a cat", "--steps", "1", "--quiet", "--output", "here/and/there")
    assert result.stdout == "here/and/there/a-cat.png\n"
    assert result.stderr == ""


def test_quiet_leaves_out_what_is_logged(sdtf, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    result = sdtf("cat " * 80, "--steps", "1", "--quiet")
    assert result.exit_code == 0, result.output
    assert "chunks" not in result.stderr


def test_what_is_logged_is_shown_once_a_command(sdtf, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    monkeypatch.setattr(logging.getLogger("stable_diffusion_tf"), "handlers", [])  # --quiet's
    for _ in range(2):
        result = sdtf("a cat", "a dog", "--steps", "1", "--negative", "blue", "--guidance", "1")
        assert result.stderr.count("no effect without guidance") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--guidance", "nan"], "--guidance must be finite, not nan"),
        (["a", "--steps", "500"], "--steps must be a whole number from 1 to 499"),
        (["a", "--size", "33"], "--size must be a multiple of 2"),
        (["a", "--output", "cat.PNG"], "--output cat.PNG is a picture's name; give a folder"),
        (["a", "--size", "100000"], "draw fewer, or smaller ones"),
        (["a", "--batch", "3000000"], "a batch of 3000000 at 32x32 is over 33,554,432 pixels"),
        (["a", "--eta", "1", "--sampler", "euler"], "samplers with one: ddim"),
        (["a", "--karras"], "schedule 'karras' does not apply; samplers that take it: lms, euler"),
        (["a", "--rescale", "2"], "--rescale must be from 0 to 1"),
        (["a", "--image", "no.png"], "Error: No such file or directory: 'no.png'"),
        (["a", "--image", "file"], "file is no picture in one of PNG, JPEG"),
        (["a", "--image", "num_steps.png"], "No such file or directory: 'num_steps.png'"),
        (["a", "--mask", "file"], "--mask says where to repaint --image; give that too"),
        (
            ["a", "--strength", "0.9"],
            "--strength is how far to leave --image behind; give that too",
        ),
        (["a", "--guidance", "1", "--rescale", "0.5"], "with it, --guidance must be over 1, not 1"),
        (
            ["a", "--image", "file", "--strength", "1.5"],
            "--strength must be over 0, up to 1, not 1.5",
        ),
        (["a", "--feather", "-1"], "--feather must be from 0 to 32 pixels"),
        (["a", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["a", "--engine", "onnx"], "unknown engine 'onnx'; known: openvino"),
        (["a", "(cat:101)"], "prompt[1]: 'cat' has the weight 101"),
        (["a", "--size", "64X65"], "--size must be a multiple of 2"),
        (["a", "--clip-skip", "4"], "--clip-skip must be a whole number from 1 to 3"),
        (["a", "--reuse", "0"], "reuse must be a whole number, 1 or more: "),
        (["a", "--prompts-file", "file"], "--prompts-file file is not UTF-8"),
        (["a", "caf\udce9"], "prompt[1]: not valid text"),
        (["a", "--negative", "(cat:101)"], "--negative: 'cat' has the weight 101"),
        (["a", "b", "--seed", str(2**64 - 1)], "seed must be a whole number from 0 to 2**64 - 2"),
        (["a", "--weights", "emojis"], "Unknown weights 'emojis': no preset, no folder"),
        (["a", "--weights", "."], "is a folder without a model"),
        (["a", "--output", "file/folder"], "file is a file; name another output folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_any_work(sdtf, tmp_path, arguments, message):
    (tmp_path / "file").write_bytes("café".encode("latin-1"))
    result = sdtf(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line)
    assert line.startswith("Error: ")
    assert message in line
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_given_empty_is_the_default(sdtf, tmp_path):
    options = ("--output", "--batch", "--like", "--prompts-file")
    empty = [text for option in options for text in (option, "")]
    result = sdtf("a cat", "--steps", "1", *empty)
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path) == ["outputs"]


def test_a_folder_may_be_called_like_a_picture(sdtf, tmp_path):
    (tmp_path / "it.png").mkdir()
    result = sdtf("a cat", "--steps", "1", "--output", "it.png")
    assert result.exit_code == 0, result.output
    assert os.listdir("it.png") == ["a-cat.png"]


def test_weights_come_from_a_hub(sdtf, hub, tiny_model):
    paths = [path for path in tiny_model.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in paths}
    hub.repositories["someone/tiny"] = files
    arguments = ["a cat", "--steps", "1", "--seed", "7"]
    result = sdtf(*arguments, "--weights", "someone/tiny")
    assert result.exit_code == 0, result.output
    assert "Their licence: some-license" in result.stderr
    sdtf(*arguments)
    np.testing.assert_array_equal(pixels("outputs/a-cat.png"), pixels("outputs/a-cat-1.png"))


def test_convert_writes_what_generate_reads(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", str(tiny_model), "new", "--dtype", "bfloat16"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == "new\n"
    assert StableDiffusion.from_pretrained("new").config.name == "tiny"

    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr == "Error: new exists. Name another target, or move it away.\n"


def test_the_last_seed_is_the_api_s(sdtf):
    result = sdtf("a cat", "--steps", "1", "--seed", str(2**64 - 1))
    assert result.exit_code == 0, result.output
    assert f"seed {2**64 - 1}" in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("a tensor is missing"), "Error: a tensor is missing"),
        (FloatingPointError("use dtype='float32'"), "Error: use dtype='float32'"),
        (OSError("no space left"), "Error: no space left"),
        (MemoryError("cannot allocate 3 TiB"), "Error: cannot allocate 3 TiB"),
        (MemoryError(), "Error: there is not enough memory."),
        (ValueError("shapes do not match"), None),
    ],
)
def test_only_what_a_user_can_mend_is_said_in_one_line_while_drawing(
    sdtf, monkeypatch, error, line
):
    def fail(*_):
        raise error

    monkeypatch.setattr(Networks, "need", fail)
    result = sdtf("a cat", "--quiet")
    if line is None:
        assert result.exception is error  # and Python shows its traceback
    else:
        assert result.exit_code == 2
        assert result.stderr == line + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: "),
        (["a", "--sampler", "plm"], "unknown sampler 'plm'; known: ddim, ddpm"),
        (["a", "--size", "3.5"], "'3.5' is neither a side (512) nor WIDTHxHEIGHT (512x768)"),
        (["a", "--batch", "0"], "--batch"),
        (["a", "--seed", "-2"], "--seed"),
        (["a", "--rng", "cuda"], "'cuda' is not one of 'numpy', 'torch'"),
        (["--quiet"], "give a PROMPT, a --prompts-file with one a line, or a picture"),
    ],
)
def test_wrong_usage_is_explained(sdtf, arguments, message):
    result = sdtf(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red apple, noto style", "a-red-apple-noto-style"),
        ("../../etc/passwd", "etc-passwd"),
        ("東京 🚀 café", "東京-café"),
        ("", "picture"),
        ("?!", "picture"),
        ("a" * 59 + " b" * 20, "a" * 59),
        ("🍎🍎", "picture"),
        ("..", "picture"),
        ("CON", "picture-con"),
        ("Lpt1!", "picture-lpt1"),
        ("conman", "conman"),
        ("\U00020000" * 100, "\U00020000" * 45),
        ("C:\\a|b<c>*?.png", "c-a-b-c-png"),
        ("-rf a", "rf-a"),
    ],
)
def test_a_prompt_makes_a_file_name(prompt, stem):
    assert slug(prompt) == stem


def test_type_checkers_are_told_of_our_annotations():
    assert (ROOT / "stable_diffusion_tf" / "py.typed").exists()


def test_samplers_are_listed_one_a_line():
    result = CliRunner().invoke(main, ["samplers"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(SAMPLERS)
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_help_teaches_and_waits_for_no_backend():
    code = (
        "import sys\n"
        "from stable_diffusion_tf.cli import main\n"
        "main(['generate', '--help'], standalone_mode=False)\n"
        "sys.exit('keras' in sys.modules or 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for taught in ("Examples:", "sdtf generate", "--negative", "euler_ancestral", "Samplers:"):
        assert taught in result.stdout


def test_the_sheet_of_the_demo_starts_silently(tmp_path, tiny_model, monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # a backend here may have set it
    sheet = [sys.executable, "scripts/contact_sheet.py", "--steps", "1", "--weights", tiny_model]
    result = subprocess.run([*sheet, "--output", tmp_path], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(b"\rLoading the model")  # nothing of the backend's before it
    assert b"XLA" not in result.stderr
    assert os.listdir(tmp_path) == ["contact_sheet.png"]


@pytest.mark.parametrize("script", ["contact_sheet", "editing_sheet", "negative_sheet"])
def test_a_sheet_has_a_folder_before_it_is_drawn(tmp_path, script):
    (tmp_path / "file").touch()
    sheet = [sys.executable, f"scripts/{script}.py", "--output", tmp_path / "file"]
    result = subprocess.run(sheet, cwd=ROOT, capture_output=True)
    assert result.returncode == 2
    assert result.stderr.endswith(b"file is a file; name another with --output.\n")
    assert b"Loading the model" not in result.stderr


def average_models(*through, **environment):
    """Runs a script that imports a backend, in a process of its own."""
    script = [sys.executable, "scripts/average_models.py", "--help"]
    settings = {"cwd": ROOT, "capture_output": True, "env": {**os.environ, **environment}}
    return subprocess.run([*through, *script], **settings)


def test_a_script_s_failed_import_is_one_line():
    result = average_models(KERAS_BACKEND="nothing")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        b"Error: Unable to import backend : nothing, Keras's backend; "
        b"install it, or set KERAS_BACKEND to tensorflow or jax"
    )
    assert b"Traceback" not in result.stderr


def test_of_a_backend_that_is_not_installed_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(SystemExit), errors_in_one_line():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    remedy = "install it, or set KERAS_BACKEND to tensorflow or jax\n"
    said = f"Error: No module named 'torch', Keras's backend; {remedy}"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("prompts", "hint"), [(["red", "apple"], 1), (["a", "red apple"], 0), (["猫", "犬"], 0)]
)
def test_who_forgets_the_quotes_is_told(sdtf, prompts, hint):
    result = sdtf(*prompts, "--steps", "1")
    assert ("prompts; one of several words goes in quotes." in result.stderr) == hint


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX descriptors")
def test_a_script_runs_without_a_screen():
    result = average_models("sh", "-c", 'exec "$@" 2>&-', "sh")
    assert result.returncode == 0
    assert b"Usage: average_models.py" in result.stdout


def test_an_import_s_noise_is_shown_only_when_it_fails(capfd):
    with quiet_import():
        os.write(2, b"noise")
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError), quiet_import():
        os.write(2, b"the cause")
        raise ImportError
    assert capfd.readouterr().err == "the cause"
    with pytest.raises(KeyboardInterrupt), quiet_import():
        os.write(2, b"noise")
        raise KeyboardInterrupt
    assert capfd.readouterr().err == ""


def python(code, *, through=(), **settings):
    """Runs it in a process of its own, after importing the command line."""
    code = (
        "import sys\n"
        "from stable_diffusion_tf.cli import main\n"
        "from stable_diffusion_tf.cli.terminal import quiet_import\n"
        f"{code}"
    )
    return subprocess.run([*through, sys.executable, "-c", code], capture_output=True, **settings)


def test_what_a_screen_cannot_show_is_escaped(tmp_path):
    path = tmp_path / "it.png"
    save_png(np.zeros((2, 2, 3), np.uint8), path, {"parameters": "東 café"})
    settings = {"env": {**os.environ, "PYTHONIOENCODING": "cp1252"}}
    result = python(f"main(['info', {str(path)!r}])", **settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip() == "\\u6771 café".encode("cp1252")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX descriptors")
def test_without_a_screen_what_is_said_there_goes_nowhere(tmp_path):
    code = (
        "main(['samplers'], standalone_mode=False)\n"
        "with quiet_import(): pass\n"
        f"with open({str(tmp_path / 'file')!r}, 'w') as file: print(file.fileno() > 2)"
    )
    result = python(code, through=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == b"True"


@pytest.fixture
def heeds_ctrl_c():
    """A job in the background ignores the signal, and what it starts inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_process_starts_silently_and_keeps_what_is_finished_on_ctrl_c(
    tmp_path, tiny_model, monkeypatch
):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # a backend here may have set it
    sdtf = [sys.executable, "-m", "stable_diffusion_tf", "generate", "a cat", "a dog"]
    with subprocess.Popen(
        [*sdtf, "--steps", "400", "--weights", tiny_model, "--output", tmp_path, "--grid"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        said = b""
        while process.poll() is None and not re.search(rb"seed \d+\n.* [1-9]\d*/400", said, re.S):
            said += process.stderr.read1()
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    said = (said + rest).decode()
    assert process.returncode == 130, said
    assert said.startswith("\rLoading the model")  # nothing of the backend's before it
    assert said.endswith("Interrupted.\n")
    assert "Traceback" not in said
    assert out.decode().split() == [str(tmp_path / "a-cat.png")]
    assert os.listdir(tmp_path) == ["a-cat.png"]
    assert pixels(tmp_path / "a-cat.png").shape == (32, 32, 3)  # whole, and all that is there


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_being_told_to_end_is_like_ctrl_c(tmp_path):
    code = (
        "import os, signal\n"
        "from stable_diffusion_tf.cli.terminal import errors_in_one_line\n"
        "from stable_diffusion_tf.files import atomic_path\n"
        f"with errors_in_one_line(), atomic_path({str(tmp_path / 'file')!r}) as path:\n"
        "    path.touch()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (143, b"Interrupted.\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("meaning", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_being_told_to_end_means_afterwards_what_it_did(meaning):
    before = signal.signal(signal.SIGTERM, meaning)
    try:
        with errors_in_one_line():
            within = signal.getsignal(signal.SIGTERM)
            assert (within is meaning) == (meaning is not signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is meaning
        with errors_in_one_line():
            signal.signal(signal.SIGTERM, print)
        assert signal.getsignal(signal.SIGTERM) is print
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_prompt_in_the_place_of_a_command_is_told_so():
    result = CliRunner().invoke(main, ["a red apple"])
    assert result.exit_code == 2
    assert result.stderr.endswith(' A picture of it: sdtf generate "a red apple"\n')
    assert "A picture" not in CliRunner().invoke(main, ["draw"]).stderr


def test_another_program_s_sampler_is_told_by_ours(sdtf):
    result = sdtf("a", "--sampler", "DPM++ 2M Karras")
    assert result.exit_code == 2
    assert "'DPM++ 2M Karras'; here it is dpmpp_2m, on Karras's noise levels" in result.stderr


def test_an_error_names_only_options_that_the_command_has():
    @click.command()
    @click.option("--size", "img_width")
    def sized(**_):
        print(with_options("the model's img_width and batch_size are odd"))
        print(with_options("prompt: 'a img_width cat' has an \"old img_width\""))

    odd, quoted = CliRunner().invoke(sized).output.splitlines()
    assert odd == "the model's --size and batch_size are odd"
    assert quoted == "prompt: 'a img_width cat' has an \"old img_width\""


def test_who_has_read_enough_is_no_error():
    with pytest.raises(BrokenPipeError), errors_in_one_line():
        raise BrokenPipeError


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
@pytest.mark.parametrize("option", ["--image", "--mask"])
def test_a_pipe_is_no_picture(sdtf, tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    result = sdtf("a cat", option, "pipe")
    assert result.exit_code == 2
    assert f"{option}: pipe is no file; save the picture as one" in result.stderr
