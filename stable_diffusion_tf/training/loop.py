"""The training loop: steps, saves that survive a kill at any moment, a loss log and previews.

All randomness of a run is a function of its seed and the step's number, so the state to save is
the weights, the optimizer (with its moving average of the weights) and that number.
"""

import csv
import os
from pathlib import Path

import keras
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.training.ema import averaged


def train(
    loss,
    batch,
    models,
    optimizer,
    *,
    steps: int,
    folder: Path,
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
        models: the `keras.Model`s whose trainable weights are updated.
        optimizer: a `keras.optimizers.Optimizer`; `use_ema=True` keeps the average that
            `averaged` swaps in.
        save_every: steps between saves; a kill costs at most that many.
        preview: `preview(step)` is called after each save with the averaged weights in place.
    """
    variables = [v for model in models for v in model.trainable_variables]
    step_fn = training_step(loss, variables, optimizer, jit)
    saves = Saves(folder, variables, optimizer)
    start = saves.restore()
    log = LossLog(Path(folder) / "loss.csv", start)
    with tqdm(
        total=steps, initial=start, desc="training", unit="step", disable=not progress
    ) as bar:
        recent = []
        for step in range(start, steps):
            recent.append(step_fn(*batch(step)))
            bar.update()
            done = step + 1
            if done % log_every == 0 or done == steps:
                mean = float(np.mean([keras.ops.convert_to_numpy(value) for value in recent]))
                if not np.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss is {mean} at step {done}; the last save before it stays in "
                        f"{folder}. Lower the learning rate, or train in float32"
                    )
                log.write(done, mean)
                bar.set_postfix(loss=f"{mean:.4f}")
                recent.clear()
            if done % save_every == 0 or done == steps:
                saves.save(done)
                if preview is not None:
                    with averaged(optimizer, variables):
                        preview(done)
    optimizer.finalize_variable_values(variables)


class Saves:
    """`state.safetensors` in `folder` and the one before it; each is whole or absent."""

    def __init__(self, folder: Path, variables, optimizer):
        self.folder = Path(folder)
        self.state = self.folder / "state.safetensors"
        self.previous = self.folder / "previous.safetensors"
        self.variables = {f"{i:04d}.{v.path}": v for i, v in enumerate(variables)} | {
            f"optimizer.{i:04d}": v for i, v in enumerate(optimizer.variables)
        }

    def save(self, step: int):
        """Writes beside the last save, then takes its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.array(v.numpy(), order="C") for name, v in self.variables.items()}
        part = self.state.with_suffix(".part")
        save_file(arrays, part, metadata={"step": str(step)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        if self.state.exists():
            os.replace(self.state, self.previous)
        os.replace(part, self.state)

    def restore(self) -> int:
        """Fills the variables from the last save; returns its step, 0 where there is none."""
        saved = next((path for path in (self.state, self.previous) if path.exists()), None)
        if saved is None:
            return 0
        with safe_open(saved, framework="numpy") as file:
            names = set(file.keys())
            if names != set(self.variables):
                odd = sorted(names ^ set(self.variables))
                raise ValueError(
                    f"{saved} is of another model or optimizer: {len(odd)} names differ, first "
                    f"{odd[:3]}. Train in a new folder, or with the arguments of that run"
                )
            for name, variable in self.variables.items():
                variable.assign(file.get_tensor(name))
            return int(file.metadata()["step"])


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
        part = path.with_suffix(".part")
        with open(part, "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *rows])
        os.replace(part, path)

    def write(self, step: int, loss: float):
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow((step, f"{loss:.6f}"))
