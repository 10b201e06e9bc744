import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFont

from stable_diffusion_tf import images


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_every_uint8_value_survives_each_conversion():
    values = np.arange(256, dtype=np.uint8)
    unit = images.uint8_to_unit(values)
    signed = images.unit_to_signed(unit)

    assert unit.dtype == signed.dtype == np.float32
    assert (unit[0], unit[-1], signed[0], signed[-1]) == (0, 1, -1, 1)
    np.testing.assert_array_equal(images.unit_to_uint8(unit), values)
    np.testing.assert_array_equal(images.unit_to_uint8(images.signed_to_unit(signed)), values)


def test_overshooting_floats_are_clipped_and_nan_is_refused():
    np.testing.assert_array_equal(images.signed_to_unit(np.array([-1.5, 1.5])), [0, 1])
    with pytest.raises(ValueError, match=r"NaN pixels.*bfloat16 or float32"):
        images.unit_to_uint8(np.array([0.5, np.nan]))


def test_a_path_a_pil_image_and_an_array_load_the_same(picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    expected = picture.astype(np.float32) / 255

    for source in (path, str(path), Image.fromarray(picture), picture, expected):
        loaded = images.load_image(source)
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, expected)


def test_exif_orientation_is_applied(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn it a quarter clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)

    loaded = images.load_image(tmp_path / "turned.png")
    np.testing.assert_array_equal(loaded, np.rot90(picture, -1).astype(np.float32) / 255)


def test_transparency_lies_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255
    for source in (rgba, Image.fromarray(rgba)):
        np.testing.assert_allclose(images.load_image(source)[0, :, 0], [1, 0.8, 0], atol=1e-6)

    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(images.load_image(palette), np.ones((1, 1, 3)))


def test_16_bit_grey_keeps_its_precision(tmp_path):
    grey = np.array([[0, 1, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")

    for source in (grey, tmp_path / "grey.png"):
        loaded = images.load_image(source)
        assert loaded.shape == (1, 4, 3)
        np.testing.assert_array_equal(loaded[..., 0], grey / np.float32(65535))

    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=32768)
    expected = np.where(grey == 32768, np.float32(1), grey / np.float32(65535))
    np.testing.assert_array_equal(images.load_image(tmp_path / "clear.png")[..., 0], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_white_is_white_in_every_mode(mode):
    white = Image.new("RGB", (2, 1), "white").convert(mode)
    if mode == "F":
        white = Image.fromarray(np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(images.load_image(white), np.ones((1, 2, 3)))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((2, 2, 2)), ValueError, r"not \(2, 2, 2\)"),
        (np.zeros((0, 2, 3)), ValueError, r"not \(0, 2, 3\)"),
        (np.full((2, 2, 3), 255.0), ValueError, r"\[255, 255\]"),
        (np.full((2, 2, 3), np.nan), ValueError, r"\[0, 1\]"),
        (np.zeros((2, 2, 3), np.int64), ValueError, "int64"),
        ([[0, 1]], TypeError, "list"),
        ("no/such/picture.png", FileNotFoundError, "picture.png"),
    ],
)
def test_what_is_no_picture_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        images.load_image(source)


def png(*chunks):
    """A PNG's bytes of chunks (kind, data), after which it ends."""
    return images.PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )


@contextmanager
def refused_within(memory, message):
    """A ValueError that matches `message`, with fewer bytes than `memory` taken on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < memory


def bomb(width, height):
    """A PNG that says it has width x height grey pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(b"")))


@pytest.mark.parametrize("size", [(6000, 6000), (12000, 10000), (65500, 65500), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_unread(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with refused_within(2**20, r"bomb\.png is too large: .* Scale it down first"):
        images.load_image(tmp_path / "bomb.png")


def test_pil_images_are_checked_as_files_are():
    with pytest.raises(ValueError, match=r"The PIL image is too large: it has 6000x6000 pixels"):
        images.load_image(Image.new("1", (6000, 6000)))
    cut = BytesIO()
    Image.new("L", (500, 500)).save(cut, "bmp")
    cut.truncate(1000)
    with pytest.raises(ValueError, match=r"The PIL image is damaged, .* truncated"):
        images.load_image(Image.open(cut))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_mutated_files_load_or_are_refused(picture, tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = BytesIO()
    Image.fromarray(np.tile(picture, (4, 4, 1))).save(whole, kind, exif=exif)
    rng = np.random.default_rng(0)
    path = tmp_path / f"mutated.{kind}"
    for _ in range(150):
        mutated = np.frombuffer(whole.getvalue(), np.uint8).copy()
        places = rng.integers(0, len(mutated), rng.integers(1, 20))
        mutated[places] = rng.integers(0, 256, len(places))
        path.write_bytes(mutated[: rng.integers(len(mutated) // 2, 2 * len(mutated))].tobytes())
        try:
            loaded = images.load_image(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert loaded.shape[-1] == 3 and 0 <= loaded.min() <= loaded.max() <= 1


def test_other_formats_are_not_opened(tmp_path):
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"program\.png is no picture in one of PNG, JPEG, WEBP"):
        images.load_image(tmp_path / "program.png")
    with pytest.raises(NotADirectoryError):
        images.load_image(tmp_path / "program.png" / "picture.png")


def test_an_animation_gives_its_first_picture(picture, tmp_path):
    first, second = (Image.fromarray(each) for each in (picture, 255 - picture))
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], lossless=True)
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    for name in ("moving.webp", "moving.png"):
        loaded = images.load_image(tmp_path / name)
        np.testing.assert_array_equal(loaded, picture.astype(np.float32) / 255)


class TestMasks:
    def test_white_is_1_in_every_kind(self, tmp_path):
        grey = np.array([[0, 127, 128, 255]], np.uint8)
        expected = (grey / np.float32(255))[..., None]
        Image.fromarray(grey).save(tmp_path / "mask.png")
        sources = [grey, tmp_path / "mask.png", Image.fromarray(grey), expected]
        for source in [*sources, np.repeat(expected, 3, -1), Image.fromarray(grey).convert("P")]:
            loaded = images.load_mask(source)
            assert loaded.dtype == np.float32
            np.testing.assert_array_equal(loaded, expected)
        np.testing.assert_array_equal(images.load_mask(grey > 127), expected > 0.5)

    def test_colours_count_by_their_luma(self):
        primaries = np.eye(3, dtype=np.float32)[None]
        luma = images.load_mask(np.concatenate([primaries, np.ones((1, 1, 3))], axis=1))
        np.testing.assert_allclose(luma[0, :, 0], [0.299, 0.587, 0.114, 1], atol=1e-6)

    def test_transparency_is_kept(self):
        rgba = np.full((1, 2, 4), 255, np.uint8)
        rgba[0, 0, 3] = 0
        np.testing.assert_array_equal(images.load_mask(rgba)[0, :, 0], [0, 1])

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.eye(4, dtype=np.uint8), r"brightest value is 0\.003922, which is black"),
            (np.eye(4) * 255, r"lies in \[0, 1\]; this one lies in \[0, 255\]"),
            (np.eye(4) - 0.5, r"\[-0\.5, 0\.5\]"),
            (np.eye(4, dtype=np.int64), "int64"),
        ],
    )
    def test_values_out_of_range_are_refused(self, mask, message):
        with pytest.raises(ValueError, match=message):
            images.load_mask(mask)

    def test_nothing_to_repaint_is_a_mask(self):
        assert not images.load_mask(np.zeros((2, 3))).any()


class TestResize:
    def test_the_same_size_changes_no_bit(self):
        image = np.random.default_rng(0).random((5, 7, 3), dtype=np.float32)
        np.testing.assert_array_equal(images.resize(image, 5, 7), image)

    @pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 500)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_size_is_stretched_to_any_other(self, size, channels):
        colour = np.linspace(0.2, 0.8, channels, dtype=np.float32)
        resized = images.resize(np.tile(colour, (*size, 1)), 24, 32)
        assert resized.shape == (24, 32, channels) and resized.dtype == np.float32
        np.testing.assert_allclose(resized, np.tile(colour, (24, 32, 1)), atol=1e-6)

    def test_many_pixels_are_averaged_and_none_lost(self):
        fine = np.indices((64, 96)).sum(0)[..., None] % 2  # a chequerboard that nearest would alias
        np.testing.assert_allclose(images.resize(fine, 8, 12), 0.5, atol=0.02)
        ramp = np.tile(np.linspace(0, 1, 96), (64, 1))[..., None]
        np.testing.assert_allclose(
            images.resize(ramp, 8, 12)[4, :, 0], (np.arange(12) + 0.5) / 12, atol=0.02
        )

    def test_overshooting_edges_are_clipped(self):
        edge = np.zeros((8, 8, 1))
        edge[:, 4:] = 1
        resized = images.resize(edge, 31, 31)
        assert (resized.min(), resized.max()) == (0, 1)


class TestFeather:
    MASK = np.zeros((40, 60, 1), np.float32)
    MASK[:, 20:] = 1

    def test_none_leaves_the_mask(self):
        np.testing.assert_array_equal(images.feather(self.MASK, 0), self.MASK)

    def test_weights_rise_inwards_from_the_edge(self):
        weights = images.feather(self.MASK, 8)
        assert weights.shape == self.MASK.shape and weights.dtype == np.float32
        assert not weights[:, :20].any()  # what is kept is kept exactly
        row = weights[20, 20:, 0]
        assert 0 <= row[0] < 0.2 and row[8] > 0.8 and (row[12:] == 1).all()
        assert (np.diff(row) >= 0).all()


def test_damaged_files_are_named(picture, tmp_path):
    whole = images.save_png(np.tile(picture, (40, 40, 1)), tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")

    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            images.load_image(tmp_path / name)


def test_a_png_holds_its_picture_and_its_text(picture, tmp_path):
    text = {"parameters": "a café 🍎\nSteps: 7", "other": "blurry"}
    path = images.save_png(picture, tmp_path / "made.png", text)

    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
        assert image.text == text
    assert os.listdir(tmp_path) == ["made.png"]


class TestPngText:
    def test_is_read_wherever_and_however_it_stands(self, tmp_path):
        (tmp_path / "a.png").write_bytes(
            png(
                (b"tEXt", b"plain\0caf\xe9\nline"),
                (b"IDAT", b"no pixels, and none wanted"),
                (b"zTXt", b"packed\0\0" + zlib.compress(b"caf\xe9")),
                (b"iTXt", b"unicode\0\0\0en\0word\0" + "🍎".encode()),
                (b"iTXt", b"both\0\1\0\0\0" + zlib.compress("🍎".encode())),
                (b"tEXt", b"plain\0a second time"),
            )
        )
        expected = {"plain": "café\nline", "packed": "café", "unicode": "🍎", "both": "🍎"}
        assert images.read_png_text(tmp_path / "a.png") == expected

    def test_of_a_picture_without_any_is_none(self, picture, tmp_path):
        assert images.read_png_text(images.save_png(picture, tmp_path / "a.png")) == {}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is no PNG"),
            (b"\xff\xd8\xff\xe0 a JPEG", "is no PNG"),
            (png()[:-12], "it is cut short"),
            (png((b"tEXt", b"a\0" + bytes(99)))[:50], "it is cut short"),
            (png((b"tEXt", b"a\0b")).replace(b"b", b"c"), "the checksum of its text is wrong"),
            (png((b"zTXt", b"a\0\0no zlib")), "incorrect header check"),
            (png((b"zTXt", b"a\0\0" + zlib.compress(b"b")[:-6])), "packed text is cut short"),
            (png((b"iTXt", b"a\0\0\0")), "is damaged"),
            (png((b"iTXt", b"a\0\0\0\0\0\xff")), "can't decode"),
            (png((b"tEXt", bytes(2**22 + 1))), "over 4,194,304 bytes of text"),
            (png(*[(b"tEXt", bytes(2**21))] * 3), "over 4,194,304 bytes of text"),
            (png((b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "bytes of text"),
            (png(*[(b"none", b"")] * 2**16), "over 65,536 chunks"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_that_is_damaged_or_too_much_is_refused(self, tmp_path, content, message):
        (tmp_path / "a.png").write_bytes(content)
        with refused_within(2**25, rf"a\.png .*{message}"):
            images.read_png_text(tmp_path / "a.png")

    def test_needs_a_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"a\.png"):
            images.read_png_text(tmp_path / "a.png")
        with pytest.raises(ValueError, match="is no file"):
            images.read_png_text(tmp_path)


def test_float_pictures_are_rounded(picture, tmp_path):
    path = images.save_png(images.uint8_to_unit(picture), tmp_path / "float.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(picture, tmp_path):
    path = tmp_path / "one.png"
    images.save_png(picture, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"one\.png"):
        images.save_png(255 - picture, path)
    assert path.read_bytes() == before

    with pytest.raises(ValueError, match=r"\(1, 5, 7, 3\)"):
        images.save_png(picture[None], tmp_path / "two.png")
    assert os.listdir(tmp_path) == ["one.png"]


@pytest.mark.parametrize(
    ("pixel", "text"), [(0.5, {"parameters": "caf\udce9"}), (np.nan, {})], ids=["text", "pixels"]
)
def test_a_picture_that_cannot_be_written_frees_its_name(tmp_path, pixel, text):
    path = images.free_path(tmp_path, "one")
    with pytest.raises(ValueError):
        images.save_png(np.full((2, 2, 3), pixel), path, text)
    assert os.listdir(tmp_path) == []


def test_free_paths_are_never_given_twice(picture, tmp_path):
    folder = tmp_path / "new" / "folder"
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: images.free_path(folder, "red-apple"), range(20)))
    assert len(set(paths)) == 20
    assert sorted(path.name for path in paths)[:2] == ["red-apple-1.png", "red-apple-10.png"]

    images.save_png(picture, paths[0])
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), picture)


def test_contact_sheet_places_pictures_row_by_row(picture):
    sheet = images.contact_sheet(np.stack([picture, 255 - picture, picture]), columns=2)

    assert sheet.shape == (22, 26, 3)
    np.testing.assert_array_equal(sheet[4:9, 4:11], picture)
    np.testing.assert_array_equal(sheet[4:9, 15:22], 255 - picture)
    np.testing.assert_array_equal(sheet[13:18, 4:11], picture)
    assert (sheet[13:18, 15:22] == 255).all()


def test_contact_sheet_labels_of_several_lines_have_one():
    black = np.zeros((1, 64, 64, 3), np.uint8)
    lines, line = (images.contact_sheet(black, labels=[text]) for text in ("a\n  b", "a b"))
    np.testing.assert_array_equal(lines, line)


@pytest.mark.parametrize("text", ["W" * 50_000, "iW" * 50, "a b", ""])
def test_a_label_is_shortened_no_more_than_it_must(text):
    font = ImageFont.load_default()
    line = images._one_line(text, font, 100)
    kept = line.removesuffix("…")
    assert text.startswith(kept) and font.getlength(line) <= 100
    assert line == text or font.getlength(text[: len(kept) + 1] + "…") > 100
    assert images._one_line(text, font, 0) == ("…" if text else "")


def test_contact_sheet_labels_fit_under_their_pictures():
    black = np.zeros((2, 200, 200, 3), np.uint8)
    plain = images.contact_sheet(black, columns=1)
    sheet = images.contact_sheet(black, columns=1, labels=["a", "a long label" * 20])

    assert sheet.shape[0] > plain.shape[0] and sheet.shape[1] == plain.shape[1]
    assert (sheet[:, -2:] == 255).all()  # the long label stops before the edge
    with pytest.raises(ValueError, match="1 labels"):
        images.contact_sheet(black, labels=["one"])


@pytest.mark.parametrize(("width", "enlarged"), [(32, 128), (100, 200), (128, 128), (129, 129)])
def test_small_pictures_are_enlarged_whole_times_for_their_labels(width, enlarged):
    picture = np.random.default_rng(0).integers(0, 256, (1, 8, width, 3), dtype=np.uint8)
    sheet = images.contact_sheet(picture, labels=["a"])
    zoom = enlarged // width
    assert sheet.shape[1] == 4 + enlarged + 4
    np.testing.assert_array_equal(sheet[4 : 4 + 8 * zoom : zoom, 4:-4:zoom], picture[0])
