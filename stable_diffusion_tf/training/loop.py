"""The training loop: steps, saves that survive a kill at any moment, a loss log and previews.

All randomness of a run is a function of its seed and the step's number, so the state to save is
the weights, the optimizer (with its moving average of the weights) and that number.
"""

import csv
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import trange

from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.files import atomic_path, settle
from stable_diffusion_tf.images import contact_sheet, save_png
from stable_diffusion_tf.training.ema import averaged, take_average, values
from stable_diffusion_tf.training.optimizer import decaying

SHOWN = 40  # characters of a long value
REMEDY = "Lower the learning rate, or train in float32"  # of numbers that are not finite


def train(
    loss,
    batch,
    models,
    optimizer,
    *,
    steps: int,
    folder: Path,
    recipe: Mapping[str, Any] | None = None,
    save_every: int = 500,
    log_every: int = 50,
    preview=None,
    jit: bool = False,
    progress: bool = True,
):
    """Runs `steps` updates of the models' weights in all, going on from the last save in `folder`.

    Killed at any moment and run again with the same arguments, it ends with the same weights as if
    it had not been; a finished run costs nothing. At the end the models hold the averaged weights,
    if the optimizer keeps an average. `folder` gets `state.safetensors`, the save before it, and
    `loss.csv`.

    Args:
        loss: `loss(*batch) -> scalar`; see `stable_diffusion_tf.training.loss`.
        batch: `batch(step) -> tuple of arrays`, a pure function of the step's number.
        models: the `keras.Model`s whose trainable weights are updated; and those that the loss
            reads only, frozen (`trainable = False`).
        optimizer: a `keras.optimizers.Optimizer`; `use_ema=True` keeps the average that
            `averaged` swaps in.
        recipe: what must not change between the pieces of a run, such as the batch size; a save
            with another one is refused.
        save_every: steps between saves; a kill costs at most that many.
        preview: `preview(step)` is called after each save with the averaged weights in place.

    Raises:
        ValueError: `steps` is under 1; a trainable weight is not float32; the save in `folder` is
            damaged, further than `steps`, or of another model, optimizer or recipe; or the
            optimizer's `WarmupStableDecay` is for another number of steps, and what is done would
            have had other rates.
        FloatingPointError: the loss or a weight is not finite; nothing is saved then.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; ask for 1 or more")
    variables = [v for model in models for v in model.trainable_variables]
    for variable in variables:
        if variable.dtype != "float32":
            raise ValueError(
                f"{variable.path} is {variable.dtype}, in which small updates are lost; load what "
                'is trained with dtype="mixed_bfloat16", whose weights are float32'
            )
    frozen = [v for model in models for v in model.non_trainable_variables]
    update = training_step(loss, variables, optimizer, jit, frozen)
    saves = Saves(folder, variables, optimizer, recipe)
    start = saves.restore()
    if start > steps:
        raise ValueError(
            f"{saves.state} is already at step {start}, and {steps} were asked for; ask for more, "
            "or train in a new folder"
        )
    log = LossLog(Path(folder) / "loss.csv", start)
    recent = []
    bar = trange(start, steps, total=steps, initial=start, unit="step", disable=not progress)
    for step in bar:
        if step == start:
            bar.set_description("Compiling")
        recent.append(update(*batch(step)))
        bar.set_description("Training", refresh=False)
        done = step + 1
        saving = done % save_every == 0 or done == steps
        if saving or done % log_every == 0:
            mean = float(np.mean([keras.ops.convert_to_numpy(value) for value in recent]))
            log.write(done, mean)
            bar.set_postfix(loss=f"{mean:.4f}")
            recent.clear()
        if saving:
            saves.save(done)
            if preview is not None:
                with averaged(optimizer, variables):
                    preview(done)
    take_average(optimizer, variables)


def save_preview(images: np.ndarray, folder: Path, step: int, **layout: Any) -> None:
    """Writes pictures on one sheet, laid out as of `contact_sheet`, as `preview<step>.png`.

    It takes the place of an earlier one: a run that goes on from a save draws some again.
    """
    path = folder / f"preview{step:06d}.png"
    path.unlink(missing_ok=True)
    save_png(contact_sheet(images, **layout), path)


def checksum(parts: Iterable[np.ndarray | bytes]) -> int:
    """Of arrays and bytes, one after another: what a run was given, for its recipe."""
    return reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)


def weights(*models: keras.Model) -> Iterator[np.ndarray]:
    """All their weights, one after another."""
    return (np.asarray(weight) for model in models for weight in model.weights)


def check_apart(target: Path, folder: Path) -> None:
    """Raises ValueError if what a run writes into `folder` would make `target`, which is to be new.

    Then the trained model could not be saved there.
    """
    if Path(folder).resolve().is_relative_to(Path(target).resolve()):
        raise ValueError(
            f"{target} is where the run itself writes, {folder}; name another target, or another "
            "folder for the runs"
        )


class Saves:
    """`state.safetensors` in `folder` and the one before it; each is whole or absent."""

    def __init__(self, folder: Path, variables, optimizer, recipe: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.state = self.folder / "state.safetensors"
        self.previous = self.folder / "previous.safetensors"
        self.recipe = {key: str(value) for key, value in (recipe or {}).items()}
        self.schedule = decaying(optimizer)
        self.variables = {f"{i:04d}.{v.path}": v for i, v in enumerate(variables)} | {
            f"{type(optimizer).__name__}.{i:04d}": v for i, v in enumerate(optimizer.variables)
        }

    def save(self, step: int):
        """Writes beside the last save, then takes its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = dict(zip(self.variables, values(self.variables.values()), strict=True))
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise FloatingPointError(f"{name} is not finite at step {step}. {REMEDY}")
        # Always the same name: what a kill leaves of it, the next save writes over.
        part = self.state.with_suffix(".part")
        metadata = {"step": str(step), "recipe": json.dumps(self.recipe)}
        if self.schedule is not None:
            metadata["steps"] = str(self.schedule.steps)
        try:
            with _written(self.state):
                save_safetensors(arrays, part, metadata)
                settle(part)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        if self.state.exists():
            os.replace(self.state, self.previous)
        os.replace(part, self.state)

    def restore(self) -> int:
        """Fills the variables from the last save; returns its step, 0 where there is none."""
        saved = next((path for path in (self.state, self.previous) if path.exists()), None)
        if saved is None:
            return 0
        try:
            file = safe_open(saved, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{saved} is damaged: {error}. Delete it to go on from {self.previous}, the save "
                "before it, or, without that, to begin again"
            ) from None
        with file:
            self._check(saved, file)
            for name, variable in self.variables.items():
                variable.assign(file.get_tensor(name))
            return int(file.metadata()["step"])

    def _check(self, saved: Path, file):
        """Raises ValueError unless the save is of these variables, this recipe and schedule."""
        ours = {name: tuple(v.shape) for name, v in self.variables.items()}
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        recipe = json.loads(file.metadata()["recipe"])
        differ = [
            f"{key} ({_difference(recipe.get(key), self.recipe.get(key))})"
            for key in sorted(self.recipe | recipe)
            if self.recipe.get(key) != recipe.get(key)
        ]
        differ += sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if differ:
            raise ValueError(
                f"{saved} is of another model, optimizer or recipe; differences: {len(differ)}, "
                f"first {', '.join(differ[:3])}. Train in another folder than {self.folder}, or "
                "as that run did"
            )
        metadata = file.metadata()
        if self.schedule is None or "steps" not in metadata:  # earlier saves do not say
            return
        step, steps = int(metadata["step"]), int(metadata["steps"])
        if not self.schedule.same_before(step, steps):
            raise ValueError(
                f"{saved} is at step {step} of {steps}, and a run of {self.schedule.steps} has "
                "other learning rates before that: the warm-up is another, or the decay had begun. "
                f"Train {steps} steps in all, or in a new folder"
            )


def _difference(then: str | None, now: str | None) -> str:
    """Two values of a recipe, or None, from a little before where they differ."""
    said = ["absent" if value is None else repr(value) for value in (then, now)]
    same = next((i for i, (a, b) in enumerate(zip(*said, strict=False)) if a != b), 0)
    start = max(0, same - SHOWN // 2)
    end = start + SHOWN
    then, now = ("…" * (start > 0) + text[start:end] + "…" * (end < len(text)) for text in said)
    return f"then {then}, now {now}"


@contextmanager
def _written(path: Path):
    """Within, an error of the disk's names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}. Make room, or mend that, and "
            "run it again: it goes on from the last save, if there is one."
        ) from error


class LossLog:
    """`step,loss` lines; those after the step that a run goes on from are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                written = [row for row in csv.reader(file) if len(row) == 2][1:]
            rows = [row for row in written if int(row[0]) <= start]
        path.parent.mkdir(parents=True, exist_ok=True)
        with _written(path), atomic_path(path) as part, open(part, "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *rows])

    def write(self, step: int, loss: float):
        """Adds a line.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}. {REMEDY}")
        with _written(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerow((step, f"{loss:.6f}"))
