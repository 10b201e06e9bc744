"""Pictures: paths, PIL images and arrays; uint8, [0, 1] and [-1, 1]; PNG files; contact sheets.

Arrays are channels-last: one picture (H, W, 3), or several (N, H, W, 3).
"""

import math
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from stable_diffusion_tf.files import atomic_path

ImageSource = str | os.PathLike | Image.Image | np.ndarray

# What is opened: not EPS, which is a program, nor TGA, which any file could be.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # theirs
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 2**22  # bytes of a PNG's text to read; some programs keep whole workflows there
MAX_CHUNKS = 2**16  # of a PNG to look at
GAP = 4  # pixels around each picture of a contact sheet
LABELLED = 128  # pixels in width, at the least, of a picture with a label
MAX_PIXELS = 2**25  # of a picture to load; a few kilobytes of PNG can unfold to gigabytes


def load_image(source: ImageSource) -> np.ndarray:
    """Picture -> float32 (H, W, 3) in [0, 1], upright, transparency on white.

    An animation gives its first picture. CMYK and other colours become RGB; embedded colour
    profiles are not applied. Pillow reads 16-bit colour as 8-bit.

    Args:
        source: a path; a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, uint16, bool, or float in [0, 1]. 16-bit grey and float values keep their
            precision.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is none of these.
        ValueError: the file is no picture in one of `FORMATS`, or damaged; the picture has over
            `MAX_PIXELS`, by its header, before any are decoded; the array's shape, type or range
            is none of the above.
    """
    pixels = _load(source, background=1)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def load_mask(source: ImageSource) -> np.ndarray:
    """Mask -> float32 (H, W, 1) in [0, 1], white 1; colours by their luma, transparency on black.

    Args:
        source: what `load_image` takes.

    Raises:
        TypeError, FileNotFoundError, ValueError: as of `load_image`; or nothing in the mask is
            white, 0.5 or over, though it is not all black either.
    """
    pixels = _load(source, background=0)
    red, green, blue = (pixels[..., [channel]] for channel in (0, pixels.shape[-1] // 2, -1))
    mask = np.clip(red + 0.587 * (green - red) + 0.114 * (blue - red), 0, 1)  # ITU-R BT.601
    if 0 < mask.max() < 0.5:
        raise ValueError(
            f"The mask's brightest value is {mask.max():.4g}, which is black: white is 1, or 255 "
            "in uint8. Scale it, or give bool."
        )
    return mask


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Float (H, W, C) in [0, 1] -> (height, width, C), stretched: the whole picture, by Lanczos.

    A picture of that size comes back as it is, to the last bit.
    """
    channels = [
        Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS)
        for channel in np.moveaxis(image.astype(np.float32), -1, 0)
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 1)  # Lanczos overshoots at edges


def feather(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Softens a mask's edge inwards: (H, W, 1) of 0 and 1 -> float32 weights, same shape.

    A weight is 0 wherever the mask is, and rises to nearly 1 within about `pixels` of its edge (as
    the error function); 0 pixels leave the mask as it is.
    """
    grey = Image.fromarray(unit_to_uint8(mask[..., 0]))
    blurred = uint8_to_unit(np.asarray(grey.filter(ImageFilter.GaussianBlur(pixels / 2))))
    return mask * np.clip(2 * blurred[..., None] - 1, 0, 1)


def _load(source: ImageSource, background: float) -> np.ndarray:
    """Picture -> float32 (H, W, 1) or (H, W, 3) in [0, 1]; transparency on a shade of grey."""
    if not isinstance(source, ImageSource):
        raise TypeError(
            f"A picture is a path, a PIL image or a NumPy array, not {type(source).__name__}."
        )
    array = source if isinstance(source, np.ndarray) else _decode(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"A picture's array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}."
        )
    unit = _to_unit(array)
    if unit.shape[-1] == 4:
        alpha = unit[..., 3:]
        unit = unit[..., :3] * alpha + background * (1 - alpha)
    return unit


def _decode(source: str | os.PathLike | Image.Image) -> np.ndarray:
    """A file or PIL image -> array, upright."""
    given = isinstance(source, Image.Image)
    name = "The PIL image" if given else source
    try:
        with nullcontext(source) if given else Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {image.width}x{image.height} pixels")
            return _pixels(image)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture in one of {', '.join(FORMATS)}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is too large: {error}, and pictures of over {MAX_PIXELS:,} are not decoded. "
            "Scale it down first."
        ) from None
    except Exception as error:  # what a decoder meets in a damaged file is of any type
        raise ValueError(f"{name} is damaged, or of a kind not supported: {error}.") from error


def _pixels(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which older Pillows open as 32-bit "I"
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        if (clear := image.info.get("transparency")) is None:
            return grey
        alpha = np.where(grey == clear, 0, 65535).astype(np.uint16)
        return np.stack([grey, grey, grey, alpha], axis=-1)
    if image.mode == "F":
        return np.asarray(image)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_unit(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return uint8_to_unit(array)
    if array.dtype == np.uint16:
        return array.astype(np.float32) / np.float32(65535)
    if array.dtype == bool:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"A picture's array is uint8, uint16, bool or float, not {array.dtype}.")
    if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
        raise ValueError(
            "A picture's float array lies in [0, 1]; this one lies in "
            f"[{array.min():.4g}, {array.max():.4g}]. Scale it, or give uint8."
        )
    return array.astype(np.float32)


def uint8_to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1], same shape."""
    return image.astype(np.float32) / np.float32(255)


def unit_to_uint8(image: np.ndarray) -> np.ndarray:
    """Float -> uint8, same shape: clipped to [0, 1], rounded; inverts `uint8_to_unit` exactly.

    Raises:
        ValueError: the image has a NaN, which no colour stands for.
    """
    if np.isnan(image).any():
        raise ValueError(
            "The image has NaN pixels: the network that made it overflowed. Run it in bfloat16 or "
            "float32."
        )
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def unit_to_signed(image: np.ndarray) -> np.ndarray:
    """[0, 1] -> [-1, 1], the range that the autoencoder works in; same shape."""
    return image * 2 - 1


def signed_to_unit(image: np.ndarray) -> np.ndarray:
    """[-1, 1] -> [0, 1], same shape; the little that a decoder overshoots is clipped."""
    return np.clip(image / 2 + 0.5, 0, 1)


def free_path(folder: str | os.PathLike, stem: str) -> Path:
    """Reserve the first free name of `stem.png`, `stem-1.png`, `stem-2.png`, … in `folder`.

    The name is taken by creating an empty file, so that two programs never get the same one;
    `save_png` fills it. The folder is made if there is none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        path = folder / (f"{stem}-{number}.png" if number else f"{stem}.png")
        if _reserve(path):
            return path
        number += 1


def _reserve(path: Path) -> bool:
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True


def save_png(
    image: np.ndarray, path: str | os.PathLike, text: Mapping[str, str] | None = None
) -> Path:
    """Write a picture, whole or not at all, and return its path; a reserved name is freed again.

    Args:
        image: uint8 (H, W, 3), or float in [0, 1], which is rounded.
        path: a new file, or a name reserved by `free_path`; pictures are never overwritten.
        text: the PNG's text chunks by keyword.

    Raises:
        FileExistsError: there is something at `path`.
        ValueError: not one picture, or the text is not valid Unicode.
    """
    path = Path(path)
    if not _reserve(path) and (not path.is_file() or path.stat().st_size):
        raise FileExistsError(f"{path} exists. Name another file, or move it away.")
    try:
        encoded = _encode(image, text or {})
        with atomic_path(path) as temporary:
            temporary.write_bytes(encoded)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _encode(image: np.ndarray, text: Mapping[str, str]) -> memoryview:
    """Picture -> the bytes of its PNG file."""
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"One picture is (H, W, 3), not {image.shape}.")
    if image.dtype != np.uint8:
        image = unit_to_uint8(image)
    chunks = PngInfo()
    for keyword, value in text.items():
        chunks.add_text(keyword, value)
    encoded = BytesIO()
    Image.fromarray(image).save(encoded, "png", pnginfo=chunks)
    return encoded.getbuffer()


def read_png_text(path: str | os.PathLike) -> dict[str, str]:
    """The text chunks of a PNG by keyword, wherever they stand; no pixel is decoded.

    Of chunks with the same keyword the first counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, or cut short or damaged there; or it has over `MAX_TEXT` bytes of
            text, unpacked, or over `MAX_CHUNKS` chunks.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would keep us waiting
        raise ValueError(f"{path} is no file.")
    with path.open("rb") as file:
        if file.read(len(PNG_MAGIC)) != PNG_MAGIC:
            raise ValueError(f"{path} is no PNG.")
        try:
            return dict(reversed(list(_text_chunks(file))))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{path} is damaged, or of a kind not supported: {error}.") from None


def _text_chunks(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Keywords and texts, as the PNG specification has them (section 11.3.3)."""
    left = MAX_TEXT
    for _ in range(MAX_CHUNKS):
        size, kind = struct.unpack(">I4s", _exactly(8, file))
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, os.SEEK_CUR)
            continue
        left = _less(left, size)
        data = _exactly(size, file)
        if _exactly(4, file) != struct.pack(">I", zlib.crc32(kind + data)):
            raise ValueError("the checksum of its text is wrong")
        keyword, _, data = data.partition(b"\0")
        packed = kind == b"zTXt" or (kind == b"iTXt" and data[:1] == b"\1")
        data = data[{b"tEXt": 0, b"zTXt": 1, b"iTXt": 2}[kind] :]  # after flag and method
        if kind == b"iTXt":
            _language, _translated, data = data.split(b"\0", 2)
        if packed:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(data, left + 1)
            left = _less(left, len(data))
            if not unpacking.eof:
                raise ValueError("its packed text is cut short")
        yield keyword.decode("latin-1"), data.decode("utf-8" if kind == b"iTXt" else "latin-1")
    raise ValueError(f"it has over {MAX_CHUNKS:,} chunks")


def _exactly(size: int, file: BinaryIO) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it is cut short")
    return data


def _less(left: int, size: int) -> int:
    if size > left:
        raise ValueError(f"it has over {MAX_TEXT:,} bytes of text")
    return left - size


def contact_sheet(
    images: np.ndarray,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Pictures side by side on white, row by row.

    Args:
        images: uint8 (N, H, W, 3).
        columns: pictures a row; without it, about as many as rows.
        labels: N texts, one under each picture, shortened to its width. Pictures under `LABELLED`
            pixels wide are enlarged for them, a whole number of times.

    Returns:
        uint8 (H', W', 3).

    Raises:
        ValueError: no pictures, or another number of labels.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"A contact sheet takes pictures (N, H, W, 3), not {images.shape}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures, but {len(labels)} labels.")
    if labels is not None:
        zoom = math.ceil(LABELLED / images.shape[2])
        images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    font = ImageFont.load_default()
    text_height = math.ceil(font.getbbox("Ag")[3]) + GAP if labels else 0
    cell_height, cell_width = height + text_height + GAP, width + GAP

    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(images):
        row, column = divmod(i, columns)
        x, y = GAP + column * cell_width, GAP + row * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        if labels:
            draw.text((x, y + height), _one_line(labels[i], font, width), fill="black", font=font)
    return np.asarray(sheet)


def _one_line(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "…"))
    return text[: max(0, fitting - 1)] + "…"
