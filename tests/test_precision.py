"""Every task in every precision, through XLA and not, beside float32 without XLA."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import synth

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.pipeline import DTYPES

SIZE = (14, 10)  # odd latents
BOUNDS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}  # relative, of final latents
BOUNDS |= {f"mixed_{dtype}": BOUNDS[dtype] for dtype in ("float16", "bfloat16")}

PICTURE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
MASK = np.zeros(SIZE, bool)
MASK[3:9, 2:7] = True
EXACT = ("float32", False)  # what the others are compared with
OTHERS = [pair for pair in product(DTYPES, (False, True)) if pair != EXACT]
TASKS = {
    "text": ("tiny_model", {}),
    "picture": ("tiny_model", {"input_image": PICTURE}),
    "hole": ("tiny_model", {"input_image": PICTURE, "input_mask": MASK}),
    "hole, 9 channels": ("tiny_inpainting", {"input_image": PICTURE, "input_mask": MASK}),
}


@pytest.fixture(scope="module")
def drawn(request):
    """`drawn(task, dtype, jit)` -> latents and picture; each model is compiled once."""

    @cache
    def model(folder, dtype, jit):
        return StableDiffusion.from_pretrained(
            request.getfixturevalue(folder),
            img_height=SIZE[0],
            img_width=SIZE[1],
            dtype=dtype,
            jit_compile=jit,
        )

    @cache
    def draw(task, dtype, jit):
        folder, settings = TASKS[task]
        sd = model(folder, dtype, jit)
        latents = sd.generate(
            "a red apple", num_steps=3, seed=0, output="latents", progress=False, **settings
        )
        return latents, sd.decode(latents)

    return draw


@pytest.mark.parametrize(("dtype", "jit"), OTHERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_in_every_precision(drawn, task, dtype, jit):
    latents, picture = drawn(task, dtype, jit)
    exact, exact_picture = drawn(task, *EXACT)
    assert latents.dtype == np.float32 and picture.dtype == np.uint8
    error = synth.relative_error(latents, exact)
    assert error <= BOUNDS[dtype]
    assert dtype == "float32" or error > 0  # it was computed in another precision
    assert picture.shape == exact_picture.shape and picture.std() > 0
