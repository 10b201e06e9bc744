"""`sdtf generate --like` and `sdtf info`: pictures drawn again by what their PNGs say."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import FILES

from stable_diffusion_tf import StableDiffusion, images
from stable_diffusion_tf.cli import main
from stable_diffusion_tf.settings import KEYWORD

FAST = ("--steps", "2", "--quiet")


def info(*arguments):
    return CliRunner().invoke(main, ["info", *arguments])


def made(path):
    return json.loads(images.read_png_text(path)[KEYWORD])


def same(one, other):
    return np.array_equal(images.load_image(one), images.load_image(other))


def forge(path, **changed):
    """A PNG that says something else than `path` of how it was drawn."""
    settings = made(path)
    facts = settings["facts"] | changed.pop("facts", {})
    text = {KEYWORD: json.dumps({**settings, **changed, "facts": facts})}
    images.save_png(np.zeros((32, 32, 3), np.uint8), "forged.png", text)
    return "forged.png"


@pytest.fixture
def cat(sdtf):
    """A PNG of the tiny model's."""
    result = sdtf("a cat", *FAST)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


class TestRepeating:
    def test_all_settings_come_from_the_png(self, sdtf, tmp_path):
        photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(photo).save("photo.png")
        Image.new("L", (20, 14), 255).save("mask.png")
        first = sdtf(
            "a (cat) 🍎", "a [dog]", "--negative", "blue", "--literal", "--clip-skip", "2",
            "--steps", "4", "--reuse", "2", "--guidance", "2.5", "--rng", "torch", "--batch", "3",
            "--size", "20x14", "--sampler", "dpmpp_2m_sde", "--karras", "--rescale", "0.3",
            "--image", "photo.png", "--mask", "mask.png", "--strength", "0.7", "--feather", "2",
            "--quiet",
        )  # fmt: skip
        assert first.exit_code == 0, first.output
        for path in first.stdout.split()[::5]:
            again = sdtf("--like", path, "--quiet", weights=None)
            assert again.exit_code == 0, again.output
            (copy,) = again.stdout.split()
            assert same(path, copy)
            assert made(path) == made(copy)

    def test_what_is_given_counts_and_the_rest_is_the_png_s(self, sdtf, tiny_model, cat):
        choices = ("--steps", "3", "--batch", "2", "--no-karras", "--quiet")
        result = sdtf("--like", cat, "a dog", *choices, weights=None)
        assert result.exit_code == 0, result.output
        dogs = result.stdout.split()
        assert [path.split("/")[1] for path in dogs] == ["a-dog.png", "a-dog-1.png"]
        before, after = made(cat), made(dogs[1])
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"prompt", "num_steps", "seed", "facts"}
        assert after["seed"] == before["seed"] + 1
        sd = StableDiffusion.from_pretrained(tiny_model)
        expected = sd.generate(
            "a dog", batch_size=2, num_steps=3, seed=before["seed"], progress=False
        )
        np.testing.assert_array_equal(images.load_image(dogs[1]), images.uint8_to_unit(expected[1]))

    def test_what_it_has_can_be_taken_back(self, sdtf, cat):
        Image.new("RGB", (32, 32), "red").save("photo.png")
        Image.new("L", (32, 32), 255).save("mask.png")
        drawn_over = ("--image", "photo.png", "--mask", "mask.png", "--feather", "2")
        over = sdtf("a cat", *drawn_over, "--seed", "5", *FAST).stdout.strip()
        plain = sdtf("a cat", "--seed", "5", *FAST).stdout.strip()
        back = ("--image", "", "--mask", "", "--feather", "", "--vae", "", "--engine", "")
        again = sdtf("--like", over, *back, "--quiet", weights=None)
        assert again.exit_code == 0, again.output
        assert same(again.stdout.strip(), plain)
        only = sdtf("--like", over, "--image", "", "--strength", "", "--quiet", weights=None)
        assert only.exit_code == 0, only.output  # the mask goes with it
        assert same(only.stdout.strip(), plain)

    def test_another_model_may_be_given(self, sdtf, cat, tiny_folder, tiny_model):
        result = sdtf("--like", cat, "--quiet", weights=tiny_folder)
        assert result.exit_code == 0, result.output
        assert same(cat, result.stdout.strip())  # it is a copy of the first
        assert made(result.stdout.strip())["weights"] == str(tiny_folder)

    def test_a_model_on_a_hub_is_named_before_it_is_fetched(self, sdtf, hub, cat, tiny_model):
        paths = [path for path in tiny_model.rglob("*") if path.is_file()]
        files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in paths}
        hub.repositories["someone/tiny"] = files
        result = sdtf("--like", forge(cat, weights="someone/tiny"), "--quiet", weights=None)
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("forged.png asks for someone/tiny, a model on a hub.\n")
        assert same(cat, result.stdout.strip())


class TestWhatCannotBeRepeated:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"tiling": True}, "this version has no settings 'tiling'; a newer one may"),
            ({"output": "/tmp"}, "no settings 'output'"),
            ({"quiet": True}, "no settings 'quiet'"),
            ({"num_steps": "x"}, "its --steps: 'x' is not a valid integer"),
            ({"num_steps": 10**6}, "--steps must be a whole number from 1 to 499"),
            ({"seed": 2**64}, "its seed: 18446744073709551616 is not in the range"),
            ({"eta": 1e999}, "is damaged"),
            ({"eta": 10**400}, "eta must be finite"),
            ({"sampler": "plms"}, "its sampler: unknown sampler 'plms'; here it is pndm"),
            ({"size": "1" * 5000}, "its size: "),
            ({"size": "33x32"}, "--size must be a multiple of 2"),
            ({"size": "60000x60000"}, "it asks for a picture of 60000x60000, over"),
            ({"prompt": 7}, "is damaged"),
            ({"prompt": None}, "is damaged"),
            ({"seed": None}, "is damaged"),
            ({"dtype": "\x1b[31mred"}, r"unknown dtype '\x1b[31mred'"),
            ({"schedule": "karras"}, "schedule 'karras' does not apply"),
            ({"facts": {"batch_seeds": "many"}}, "is damaged"),
            ({"facts": {"batch_seeds": []}}, "is damaged"),
            ({"facts": {"unet_sha256": "0123456789"}}, "is another now, whose hash is"),
            ({"facts": {"decoder_sha256": [7]}}, "is another now, whose hash is"),
            ({"weights": "emojis"}, "its weights 'emojis' is not here; give one with --weights"),
            ({"weights": "/dev/zero"}, "is no regular file"),
            ({"weights": "\\\\evil\\share\\model"}, "is on another computer"),
            ({"input_image": "//evil/share/a.png"}, "give it with --image"),
            ({"vae": "nowhere"}, "its vae 'nowhere' is not here; give one with --vae"),
            ({"input_image": "gone.png"}, "its --image 'gone.png' is not here; give one"),
            ({"input_image": "/dev/zero"}, "is not here"),
            ({"input_image": "outputs/a-cat.png"}, "is another one now; give one with --image"),
        ],
    )
    def test_is_said_in_one_line(self, sdtf, cat, changed, message):
        if "seed" in changed:
            changed = {**changed, "facts": {"batch_seeds": [changed["seed"]]}}
        result = sdtf("--like", forge(cat, **changed), "--quiet", weights=None)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert message in line
        assert result.stdout == ""

    def test_huge_batches_are_refused(self, sdtf, cat):
        seeds = [made(cat)["seed"] + i for i in range(40_000)]
        result = sdtf("--like", forge(cat, facts={"batch_seeds": seeds}), weights=None)
        assert "is of 40000 pictures of 32x32 that were drawn at once" in result.stderr
        assert f"give --seed {seeds[0]} to draw it alone" in result.stderr
        alone = sdtf("--like", "forged.png", "--seed", str(seeds[0]), "--quiet", weights=None)
        assert alone.exit_code == 0

    def test_a_picture_drawn_over_must_be_the_same(self, sdtf):
        Image.new("RGB", (32, 32), "red").save("photo.png")
        first = sdtf("a cat", "--image", "photo.png", *FAST).stdout.strip()
        shutil.copy("photo.png", "moved.png")
        Image.new("RGB", (32, 32), "blue").save("photo.png")
        result = sdtf("--like", first, "--quiet", weights=None)
        assert result.stderr == (
            f"Error: {first} cannot be drawn again: its --image 'photo.png' is another one "
            "now; give one with --image.\n"
        )
        result = sdtf("--like", first, "--image", "moved.png", "--quiet", weights=None)
        assert same(first, result.stdout.strip())

    @pytest.mark.parametrize(
        ("changed", "part", "another", "option"),
        [
            ("text_encoder", "text_encoder", False, "--weights"),
            ("unet", "unet", False, "--weights"),
            ("vae", "decoder", False, "--weights"),
            ("vae", "decoder", True, "--vae"),
        ],
    )
    def test_a_picture_of_a_model_that_is_another_now(
        self, sdtf, tiny_folder, tiny_model, changed, part, another, option
    ):
        path = tiny_folder / FILES[changed]
        weights = tiny_model if another else tiny_folder
        vae = ("--vae", str(path)) if another else ()
        first = sdtf("a cat", *vae, *FAST, weights=weights).stdout.strip()
        assert same(first, sdtf("--like", first, "--quiet", weights=None).stdout.strip())
        save_file({name: -values for name, values in load_file(path).items()}, path)
        result = sdtf("--like", first, "--quiet", weights=None)
        assert result.exit_code == 2
        its_hash = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
        assert result.stderr == (
            f"Error: {first} cannot be drawn again: the {part} of {path if another else weights} "
            f"is another now, whose hash is {its_hash}; give one with {option}.\n"
        )
        given = (option, str(path if another else weights))
        assert sdtf("--like", first, *given, "--quiet", weights=None).exit_code == 0

    def test_a_picture_of_a_model_with_another_config_now(self, sdtf, cat, tiny_folder):
        first = sdtf("a cat", *FAST, weights=str(tiny_folder)).stdout.strip()
        assert sdtf("--like", first, "--quiet", weights=None).exit_code == 0
        file = tiny_folder / "scheduler" / "scheduler_config.json"
        schedule = json.loads(file.read_text())
        file.write_text(json.dumps({**schedule, "timestep_spacing": "trailing"}))
        result = sdtf("--like", first, "--quiet", weights=None)
        assert result.exit_code == 2
        assert "say beside their weights is something else now" in result.stderr
        for given in (("--weights", str(tiny_folder)), ("--prediction", "epsilon")):
            assert sdtf("--like", first, "--quiet", *given, weights=None).exit_code == 0
        # An older version's config may be told otherwise.
        older = forge(first, facts={"version": "0.0.1"})
        assert sdtf("--like", older, "--quiet", weights=None).exit_code == 0

    def test_a_picture_of_another_backend_s(self, sdtf, cat):
        forged = forge(cat, facts={"backend": "another"})
        said = "was drawn on another Keras backend"
        assert said in sdtf("--like", forged, weights=None).stderr
        for more in ("--quiet",), ("--steps", "3"):
            assert said not in sdtf("--like", forged, *more, weights=None).stderr

    def test_only_networks_that_it_took_are_compared(self, sdtf, cat):
        Image.new("RGB", (32, 32)).save("photo.png")
        result = sdtf("--like", cat, "--image", "photo.png", "--quiet", weights=None)
        assert result.exit_code == 0, result.output
        assert "encoder_sha256" in made(result.stdout.strip())["facts"]

    def test_a_picture_without_settings(self, sdtf):
        images.save_png(np.zeros((2, 2, 3), np.uint8), "other.png", {"parameters": "a cat"})
        (line,) = sdtf("--like", "other.png").stderr.splitlines()
        assert line.startswith("Error: other.png cannot be drawn again: it does not say how")

    @pytest.mark.parametrize(
        "prompt",
        ["../../x", "CON", "", "🍎🍎", "x" * 5000, "a\x1b[2Jb"],
        ids=lambda prompt: prompt[:9],
    )
    def test_any_prompt_s_picture_stays_in_the_folder(self, sdtf, tmp_path, cat, prompt):
        before = set(tmp_path.rglob("*"))
        result = sdtf("--like", forge(cat, prompt=prompt), "--quiet", weights=None)
        assert result.exit_code == 0, result.output
        new = set(tmp_path.rglob("*")) - before - {tmp_path / "forged.png"}
        assert [path.parent for path in new] == [tmp_path / "outputs"]
        assert made(new.pop())["prompt"] == prompt


class TestInfo:
    def test_prints_what_was_stored(self, cat):
        result = info(cat)
        assert result.exit_code == 0
        assert result.stdout.startswith("a cat\nSteps: 2, Sampler: DDIM, Schedule type: ")
        assert json.loads(info(cat, "--json").stdout) == made(cat)

    def test_json_is_json_whatever_is_in_a_prompt(self, sdtf):
        drawn = sdtf("a\x85b\x7fc", "--steps", "1", "--quiet").stdout.strip()
        assert json.loads(info(drawn, "--json").stdout) == made(drawn)

    def test_reads_other_programs_pictures_and_lets_none_steer_the_terminal(self, sdtf):
        said = "a 👩‍🚀\x1b[2J\u202e cat\r\nSteps: 20, Sampler: Euler a"
        images.save_png(np.zeros((2, 2, 3), np.uint8), "other.png", {"parameters": said})
        expected = "a 👩‍🚀\\x1b[2J\\u202e cat\\r\nSteps: 20, Sampler: Euler a\n"
        assert info("other.png").stdout == expected

    @pytest.mark.parametrize(
        ("content", "arguments", "message"),
        [
            ({}, [], "Error: it.png does not say how it was drawn: it has no text 'parameters'."),
            ({"parameters": "a"}, ["--json"], "'stable_diffusion_tf'; without --json it does."),
            ({"stable_diffusion_tf": "{"}, ["--json"], "it.png is damaged: its text "),
            (None, [], "Error: it.png is no PNG."),
        ],
    )
    def test_says_what_is_wrong(self, sdtf, content, arguments, message):
        if content is None:
            Image.new("RGB", (2, 2)).save("it.png", "jpeg")
        else:
            images.save_png(np.zeros((2, 2, 3), np.uint8), "it.png", content)
        result = info("it.png", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "No such file" in info("absent.png").stderr
