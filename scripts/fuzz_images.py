"""Feeds damaged pictures to the readers and counts what they make of them.

    python scripts/fuzz_images.py --count 5000        # files in all

Each case is a good small picture, PNG, JPEG, WebP or an animation, changed at random: bits flipped,
cut short, bytes and chunks repeated, lost or taken from others, sizes forged; in PNGs checksums are
made right again, or nothing would get past them. `load_image`, `load_mask` and `read_png_text` may
take it or raise ValueError. Anything else is a failure: another exception, more than 5 seconds,
300 MB, an import, a file made. Exit status 1 if anything failed.
"""

import io
import math
import random
import struct
import tempfile
import warnings
import zlib
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import click
import numpy as np
from fuzzing import finish, fuzz, most_memory, mutated
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion_tf.images import PNG_MAGIC, load_image, load_mask, read_png_text

MEGABYTES = 300
SIDES = (0, 1, 2, 255, 4000, 5792, 5793, 16383, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
KINDS = ("IHDR", "PLTE", "IDAT", "IEND", "tRNS", "gAMA", "iCCP", "eXIf", "tEXt", "zTXt", "iTXt")
KINDS += ("acTL", "fcTL", "fdAT", "sRGB", "pHYs", "zzzz")
RIFF_PIECES = (b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP", b"XMP ")
JPEG_PIECES = tuple(b"\xff" + bytes([marker]) for marker in range(0xC0, 0xFF))


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def good_files() -> dict[str, list[bytes]]:
    """Files of each kind, with what a format can have beside the pixels."""
    text = PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20, Seed: 7")
    text.add_text("parameters", "a cat" * 50, zip=True)
    text.add_itxt("stable_diffusion_tf", '{"prompt": "a 🐈"}' * 20, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [picture(), picture()]}
    wide = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40))
    return {
        "png": [
            saved(picture(), "png", pnginfo=text, exif=exif),
            saved(picture("P"), "png", transparency=3),
            saved(picture("RGBA"), "png", **more),
            saved(wide, "png"),
        ],
        "jpeg": [
            saved(picture(), "jpeg", exif=exif, comment=b"a comment"),
            saved(picture("CMYK"), "jpeg"),
            saved(picture("L"), "jpeg", progressive=True),
        ],
        "webp": [
            saved(picture(), "webp", exif=exif),
            saved(picture("RGBA"), "webp", lossless=True),
            saved(picture(), "webp", **more),
        ],
    }


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(PNG_MAGIC)
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def damaged_png(good: list[bytes], rng: random.Random) -> bytes:
    """Bytes changed anywhere; or chunks, of which the checksums are right."""
    if rng.random() < 0.3:
        return mutated(rng.choice(good), (), rng)
    parts = chunks(rng.choice(good))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        kind, data = parts[at]
        match rng.randrange(5):
            case 0:
                parts[at] = kind, mutated(data, (), rng)
            case 1:
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(chunks(rng.choice(good))))
            case 2:
                parts[at] = rng.choice(KINDS).encode(), data
            case 3 if len(parts) > 1:
                del parts[at]
            case 4:
                header = bytearray(parts[0][1].ljust(13, b"\0"))
                struct.pack_into(">I", header, rng.choice((0, 4)), rng.choice(SIDES))
                parts[0] = parts[0][0], bytes(header)
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def damaged_jpeg(good: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(good))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if rng.random() < 0.3:
        side = rng.choice(SIDES) & 0xFFFF
        struct.pack_into(">H", data, frame + rng.choice((5, 7)), side)
    return mutated(bytes(data), JPEG_PIECES, rng)


def damaged_webp(good: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(good))
    canvas = data.find(b"VP8X")
    if rng.random() < 0.3 and canvas >= 0:
        side = (rng.choice(SIDES) & 0xFFFFFF).to_bytes(3, "little")
        at = canvas + 12 + rng.choice((0, 3))
        data[at : at + 3] = side
        if rng.random() < 0.5:
            return bytes(data)
    return mutated(bytes(data), RIFF_PIECES, rng)


def read(path: Path) -> None:
    """All three readers; ValueError if it is no picture."""
    for reader in (read_png_text, load_mask):
        with suppress(ValueError):
            reader(path)
    array = load_image(path)
    if not (array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1):
        raise AssertionError(f"{array.dtype} from {array.min()} to {array.max()}")


@click.command(help=__doc__)
@click.option("--count", default=300, show_default=True, help="Files in all.")
@click.option("--seed", default=0, show_default=True)
def main(count: int, seed: int) -> None:
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    damage = {"png": damaged_png, "jpeg": damaged_jpeg, "webp": damaged_webp}
    good = good_files()
    with tempfile.TemporaryDirectory() as folder:  # what is imported once, is before the first case
        for i, content in enumerate(chain(*good.values())):
            path = Path(folder) / str(i)
            path.write_bytes(content)
            read(path)
    before = most_memory()
    failures = []
    for kind, files in good.items():
        make = partial(damage[kind], files)
        failures += fuzz(kind, make, read, ValueError, math.ceil(count / len(good)), seed)
    finish(failures, before, MEGABYTES)


if __name__ == "__main__":
    main()
