"""Checks of what a caller gives: each passes it on in one form, or names it in an error."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from stable_diffusion_tf.images import ImageSource, load_image, resize

LARGEST = float(np.finfo(np.float32).max)
MAX_PIXELS = 2**25  # to draw at once: a slip of a digit must not take all the memory there is


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_size(name: str, size: Any, factor: int, least: int | None = None) -> None:
    """A side of a picture, in pixels: a multiple of `factor`, `least` or more (None: `factor`)."""
    least = least or factor
    if not _whole(size):
        raise TypeError(f"{name} must be a whole number of pixels, not {size!r}")
    if size < least or size % factor:
        below = max(size // factor * factor, least)
        raise ValueError(
            f"{name} must be a multiple of {factor} for this model, {least} or more, not {size}; "
            f"for example {below} or {below + factor}"
        )


def check_pixels(count: int, height: int, width: int) -> None:
    """Of pictures that are drawn at once."""
    if count * height * width > MAX_PIXELS:
        raise ValueError(
            f"a batch of {count} at {width}x{height} is over {MAX_PIXELS:,} pixels, too many to "
            "draw at once; draw fewer, or smaller ones"
        )


def check_clip_skip(clip_skip: Any, layers: int) -> None:
    if not (_whole(clip_skip) and 1 <= clip_skip <= layers):
        raise ValueError(
            f"clip_skip must be a whole number from 1 to {layers}, the text encoder's layers, "
            f"not {clip_skip!r}"
        )


def check_reuse(reuse: Any) -> None:
    if not (_whole(reuse) and reuse >= 1):
        raise ValueError(
            "reuse must be a whole number, 1 or more: the whole network runs at every call, every "
            f"2nd, …; not {reuse!r}"
        )


def number(
    name: str,
    value: Any,
    range: str = "finite",
    holds: Callable[[float], bool] = lambda value: True,
) -> float:
    """A finite number for which `holds(value)`, which `range` says in words."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be at most {LARGEST:.1e}, which it is far beyond") from None
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, not {value!r}")
    if abs(found) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:.1e}, float32's largest, not {value!r}")
    if not holds(found):
        raise ValueError(f"{name} must be {range}, not {value!r}")
    return found


def guidance(scale: Any, rescale: Any, default: float) -> tuple[float | None, float | None]:
    """The scale of guidance and its rescale; None where there is none of it."""
    scale = number("unconditional_guidance_scale", default if scale is None else scale)
    rescale = number("guidance_rescale", rescale, "from 0 to 1", lambda x: 0 <= x <= 1)
    if scale > 1:
        return scale, rescale or None
    if rescale:
        raise ValueError(
            "guidance_rescale tempers guidance, and there is none: with it, "
            f"unconditional_guidance_scale must be over 1, not {scale:g}; or leave it out"
        )
    return None, None


def function(name: str, given: Any) -> Callable:
    """A function, or None -> one that does nothing."""
    if given is None:
        return lambda *args: None
    if not callable(given):
        raise TypeError(f"{name} must be a function or None, not {given!r}")
    return given


def texts(name: str, given: Any) -> list[str]:
    """One text or several -> list."""
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{name} must be text or a list of texts, not {given!r}")
    if not found:
        raise ValueError(f"{name} is an empty list; give at least one text")
    return list(found)


def sources(name: str, given: Any) -> list[Any]:
    """One picture or several, or None -> list of what `load_image` takes."""
    if given is None:
        return []
    several = isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == 4)
    if several and not len(given):
        raise ValueError(f"{name} is an empty list; give at least one picture")
    return list(given) if several else [given]


def resized(
    name: str, given: Sequence[Any], load: Callable[[Any], np.ndarray], height: int, width: int
) -> list[np.ndarray]:
    """Pictures or masks, of what `load` takes, all of one size."""
    return [resize(picture, height, width) for picture in _loaded(name, given, load)]


def _loaded(
    name: str, given: Sequence[Any], load: Callable[[Any], np.ndarray]
) -> Iterator[np.ndarray]:
    for i, source in enumerate(given):
        try:
            yield load(source)
        except (TypeError, ValueError) as error:
            label = f"{name}[{i}]" if len(given) > 1 else name
            raise type(error)(f"{label}: {error}") from error


def same_size(name: str, given: ImageSource | Sequence[ImageSource], factor: int) -> np.ndarray:
    """One or several -> float32 (B, H, W, 3) in [0, 1], H and W multiples of `factor`."""
    if hasattr(given, "__array__") and hasattr(given, "dtype"):  # a backend's tensor
        given = np.asarray(given)
    pictures = list(_loaded(name, sources(name, given), load_image))
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"{name} must be one or more, all of one size, not {sorted(sizes)}")
    for side, size in zip(("height", "width"), sizes.pop(), strict=True):
        check_size(f"the {name}' {side}", size, factor)
    return np.stack(pictures)


def picture_count(given: int, batch_size: Any) -> int:
    """Number of pictures of `given` prompts, or of whatever there are most of."""
    if not _whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}")
    if given == 1:
        return int(batch_size)
    if batch_size not in (1, given):
        raise ValueError(
            f"batch_size {batch_size} does not fit {given} prompts, contexts or images, which give "
            f"{given} pictures; leave it out, or repeat them in the list"
        )
    return given


def check_counts(count: int, given: Mapping[str, Sequence]) -> None:
    """There is none, one, or one a picture of everything that is given."""
    for name, values in given.items():
        if len(values) not in (0, 1, count):
            raise ValueError(
                f"{len(values)} {name} for {count} pictures; give one, or one a picture"
            )


def array(name: str, value: Any, *shapes: tuple[int | str, ...]) -> np.ndarray:
    """Finite numbers of one of `shapes`, with letters where any size will do: -> float32."""
    try:
        found = np.asarray(value).astype(np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, not {value!r}") from None
    if not any(_fits(found.shape, shape) for shape in shapes):
        known = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(f"{name} must have the shape {known}, not {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return found


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size > 0 if isinstance(want, str) else size == want
        for size, want in zip(shape, wanted, strict=True)
    )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
