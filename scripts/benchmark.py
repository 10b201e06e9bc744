"""Times our stages beside the other libraries that are installed here: seconds, ratios, memory.

\b
  text     a prompt of 77 tokens through the text encoder
  step     one guided step: the UNet on a batch of 2
  decode   latents to a picture
  picture  a whole one, from the prompt: text, --steps guided steps, decode

Every contestant runs in a process of its own. Those of one stage and dtype are loaded one after the
other; then they take turns, round by round, one at work while the others wait, so that a machine
that slows down slows all of them. A first run of each, which compiles, is not counted. Weights are
random: nothing is downloaded, and the time is that of real ones. Who is not installed, lacks a
stage, or dies, is named at the end.

\b
Contestants:
  ours           this package on Keras's backend (KERAS_BACKEND), by its public functions
  ours-jit       the same with jit_compile=True
  ours-openvino  the same with engine="openvino"
  diffusers      diffusers' networks and pipeline on PyTorch
  openvino       diffusers' networks, converted by openvino.convert_model
  keras-cv       KerasCV's networks, which exist in one size: sd-1

"ours / it" is the median of the rounds' ratios, the first contestant's seconds by this one's: below
1, the first is faster. Peak memory is the process's while it runs, without loading; at Stable
Diffusion's size, leave 5 GB for each contestant in float32. "ours" always has all four networks in
memory, the others those of the stage.

\b
Examples:
  scripts/benchmark.py --size tiny
  scripts/benchmark.py --stage step --dtype bfloat16 --contestant ours --contestant openvino
  scripts/benchmark.py --stage decode --image-size 1024 --rounds 3 --json decode.json
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from stable_diffusion_tf.config import (
    SD_1,
    SD_2_BASE,
    AutoencoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion_tf.files import atomic_path

STAGES = ("text", "step", "decode", "picture")
DTYPES = ("float32", "bfloat16")
SIZES = {
    "tiny": ModelConfig(
        name="tiny",
        text_encoder=TextEncoderConfig(width=32, layers=2, heads=4, mlp_width=64),
        unet=UNetConfig(
            widths=(32, 64), resnets=1, attention=(True, False), heads=(4, 4), context_width=32
        ),
        autoencoder=AutoencoderConfig(widths=(32, 32, 32, 64), resnets=1),
        image_size=64,
    ),
    "sd-1": SD_1,
    "sd-2-base": SD_2_BASE,
}
PROMPT = "a photograph of an astronaut riding a horse"
GUIDANCE = 7.5


class CannotRun(Exception):
    """Why a contestant takes no part."""


@dataclass(frozen=True)
class Job:
    """What one process does, again and again."""

    contestant: str
    stage: str
    dtype: str
    size: str
    image_size: int
    steps: int

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.size]

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.image_size // self.config.autoencoder.factor

    def normal(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def latents(self, batch: int) -> np.ndarray:
        return self.normal(batch, self.side, self.side, self.config.unet.in_channels)

    def context(self, batch: int) -> np.ndarray:
        config = self.config
        return self.normal(batch, config.text_encoder.max_length, config.unet.context_width)

    @property
    def token_ids(self) -> np.ndarray:
        text = self.config.text_encoder
        return np.random.default_rng(0).integers(text.vocab_size, size=(1, text.max_length))


def ours(job: Job, **options: Any) -> Callable[[], Any]:
    from stable_diffusion_tf import StableDiffusion
    from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part

    parts = {part: build_part(job.config, part, job.dtype) for part in MODELS}
    sizes = {"img_height": job.image_size, "img_width": job.image_size}
    try:
        sd = StableDiffusion.from_models(Models(job.config, **parts), **sizes, **options)
    except (TypeError, ValueError, ImportError) as error:
        raise CannotRun(str(error)) from error
    latents, context = job.latents(1), job.context(1)
    drawing = {"unconditional_guidance_scale": GUIDANCE, "seed": 0, "progress": False}

    def step():
        return sd.generate(
            None,
            context=context,
            negative_context=context,
            diffusion_noise=latents,
            num_steps=1,
            output="latents",
            **drawing,
        )

    return {
        "text": lambda: sd.encode_text(PROMPT),
        "step": step,
        "decode": lambda: sd.decode(latents),
        "picture": lambda: sd.generate(PROMPT, num_steps=job.steps, **drawing),
    }[job.stage]


class Reference:
    """diffusers' and transformers' networks of the same config, in PyTorch."""

    def __init__(self, job: Job):
        from stable_diffusion_tf.checkpoints.config_json import write_config

        self.job = job
        self.files = write_config(job.config)

    def text_encoder(self):
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**self.files["text_encoder/config.json"])).eval()

    def unet(self):
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(self.files["unet/config.json"]).eval()

    def vae(self):
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(self.files["vae/config.json"]).eval()

    def network(self) -> tuple[Any, Callable, tuple]:
        """The stage's: module, how it is called, and with what."""
        import torch

        def channels_first(latents):
            return torch.tensor(latents.transpose(0, 3, 1, 2).copy())

        job = self.job
        if job.stage == "text":
            module = self.text_encoder()
            return module, lambda ids: module(ids)[0], (torch.tensor(job.token_ids),)
        if job.stage == "step":
            module = self.unet()
            timesteps = torch.tensor([981.0, 981.0])
            inputs = channels_first(job.latents(2)), timesteps, torch.tensor(job.context(2))
            return module, lambda *inputs: module(*inputs, return_dict=False)[0], inputs
        if job.stage == "decode":
            module = self.vae()
            decoder = torch.nn.Sequential(module.post_quant_conv, module.decoder)
            return decoder, decoder, (channels_first(job.latents(1)),)
        raise CannotRun(f"has no {job.stage} stage of its own")


def diffusers(job: Job) -> Callable[[], Any]:
    import torch

    reference, dtype = Reference(job), getattr(torch, job.dtype)
    if job.stage == "picture":
        return _diffusers_picture(reference, dtype)
    module, call, inputs = reference.network()
    module.to(dtype)
    inputs = [x.to(dtype) if x.ndim > 1 and x.is_floating_point() else x for x in inputs]

    @torch.inference_mode()
    def run():
        return call(*inputs)

    return run


def _diffusers_picture(reference: Reference, dtype: Any) -> Callable[[], Any]:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    job = reference.job
    text_encoder = reference.text_encoder().to(dtype)
    pipeline = StableDiffusionPipeline(
        vae=reference.vae().to(dtype),
        text_encoder=text_encoder,
        tokenizer=None,  # whose vocabulary would have to be downloaded
        unet=reference.unet().to(dtype),
        scheduler=DDIMScheduler.from_config(reference.files["scheduler/scheduler_config.json"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    ids = torch.tensor(job.token_ids)

    @torch.inference_mode()
    def run():
        return pipeline(
            prompt_embeds=text_encoder(ids)[0],
            negative_prompt_embeds=text_encoder(ids)[0],
            height=job.image_size,
            width=job.image_size,
            num_inference_steps=job.steps,
            guidance_scale=GUIDANCE,
            output_type="np",
        )

    return run


def openvino(job: Job) -> Callable[[], Any]:
    import openvino
    import torch

    module, call, inputs = Reference(job).network()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return call(*inputs)

    arrays = [x.numpy() for x in inputs]
    with torch.inference_mode():
        model = openvino.convert_model(
            Network().eval(), example_input=inputs, input=[array.shape for array in arrays]
        )
    precision = {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    return lambda: request.infer(arrays)


def keras_cv(job: Job) -> Callable[[], Any]:
    if job.size != "sd-1":
        raise CannotRun("has networks of one size, sd-1")
    if job.stage == "picture":
        raise CannotRun("would have to download a vocabulary")
    import keras

    keras.config.set_dtype_policy(job.dtype)
    from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, text_encoder

    size, length = job.image_size, job.config.text_encoder.max_length
    if job.stage == "text":
        network = text_encoder.TextEncoder(length, download_weights=False)
        positions = np.arange(length, dtype=np.int32)[None]
        inputs = [job.token_ids.astype(np.int32), positions]
    elif job.stage == "step":
        network = diffusion_model.DiffusionModel(size, size, length, download_weights=False)
        inputs = {
            "latent": job.latents(2),
            "timestep_embedding": job.normal(2, 320),
            "context": job.context(2),
        }
    else:
        network = decoder.Decoder(size, size, download_weights=False)
        inputs = job.latents(1)
    return lambda: network.predict_on_batch(inputs)


CONTESTANTS: dict[str, tuple[Callable[..., Callable[[], Any]], dict[str, Any]]] = {
    "ours": (ours, {}),
    "ours-jit": (ours, {"jit_compile": True}),
    "ours-openvino": (ours, {"engine": "openvino"}),
    "diffusers": (diffusers, {}),
    "openvino": (openvino, {}),
    "keras-cv": (keras_cv, {}),
}


def work(job: Job) -> None:
    """A contestant's process: loads, then runs once for every line it gets, and says how long."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print

    def say(**message):
        print(json.dumps(message), file=out)

    try:
        build, options = CONTESTANTS[job.contestant]
        run = build(job, **options)
        gc.collect()
        forget_peak()
        start = time.perf_counter()
        run()
    except (CannotRun, ImportError) as error:
        return say(cannot=str(error))
    say(first=time.perf_counter() - start)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        say(seconds=time.perf_counter() - start, peak=peak_memory())


def forget_peak() -> None:
    with suppress(OSError):  # Linux's; elsewhere the peak includes loading
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float | None:
    """Most memory the process has held, in MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return None


class Worker:
    """A contestant's process, as its parent sees it."""

    def __init__(self, job: Job, log: Path):
        self.job = job
        self.first: float | None = None
        self.seconds: list[float] = []
        self.peak: float | None = None
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--work", json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )

    def warm_up(self) -> None:
        """Waits until it has loaded and run once."""
        self.first = self._answer()["first"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self._log.read_text().strip().splitlines()
            raise CannotRun(f"died with exit code {code}: {said[-1] if said else 'silently'}")
        answer = json.loads(line)
        if "cannot" in answer:
            raise CannotRun(answer["cannot"])
        return answer

    def run(self) -> None:
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how it died
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.peak = answer["peak"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


def compare(jobs: Iterable[Job], rounds: int) -> tuple[list[Worker], list[dict[str, str]]]:
    """Runs the contestants of one stage and dtype in turn: those that did, and why others not."""
    workers: list[Worker] = []
    skipped = []

    @contextmanager
    def in_the_running(job: Job) -> Iterator[None]:
        try:
            yield
        except CannotRun as error:
            where = {"contestant": job.contestant, "stage": job.stage, "dtype": job.dtype}
            skipped.append({**where, "why": str(error)})
            workers[:] = [worker for worker in workers if worker.job != job]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for job in jobs:
            with in_the_running(job):
                worker = Worker(job, folder / job.contestant)
                stack.callback(worker.stop)
                worker.warm_up()
                workers.append(worker)
        for _ in range(rounds):
            for worker in list(workers):
                with in_the_running(worker.job):
                    worker.run()
    return workers, skipped


def rows(workers: Sequence[Worker]) -> Iterator[dict[str, Any]]:
    """The figures of contestants that took turns; ratios are the first one's time by theirs."""
    for worker in workers:
        pairs = zip(workers[0].seconds, worker.seconds, strict=True)
        yield {
            "stage": worker.job.stage,
            "dtype": worker.job.dtype,
            "contestant": worker.job.contestant,
            "seconds": worker.seconds,
            "median": statistics.median(worker.seconds),
            "ratio": statistics.median(first / own for first, own in pairs),
            "first_run": worker.first,
            "peak_mib": worker.peak,
        }


def table(figures: Sequence[dict[str, Any]]) -> str:
    first = figures[0]["contestant"]
    heads = ("stage", "dtype", "contestant", "median s", "min", "max", f"{first} / it", "peak MiB")
    lines = [heads]
    for row in figures:
        low, high = min(row["seconds"]), max(row["seconds"])
        peak = "?" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        numbers = [f"{value:.4g}" for value in (row["median"], low, high)]
        ratio = f"{row['ratio']:.2f}"
        lines.append((row["stage"], row["dtype"], row["contestant"], *numbers, ratio, peak))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tensorflow", "jax", "keras", "torch", "diffusers", "openvino", "keras-cv"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def choices(name: str, known: Iterable[str], help: str) -> Callable:
    return click.option(
        f"--{name}",
        f"{name.replace('-', '_')}s",
        type=click.Choice(list(known)),
        multiple=True,
        help=f"{help}; may be repeated. All of them, if left out.",
    )


@click.command(help=__doc__)
@choices("stage", STAGES, "What to time")
@choices("dtype", DTYPES, "Of weights and arithmetic")
@choices("contestant", CONTESTANTS, "Who; the first is what the others are compared with")
@click.option("--size", type=click.Choice(list(SIZES)), default="sd-1", show_default=True)
@click.option("--image-size", type=int, help="Of pictures, in pixels; the model's own.")
@click.option("--steps", default=20, show_default=True, help="Of a whole picture.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "path", type=Path, help="Also write everything to this file.")
@click.option("--work", "job", hidden=True, help="What a contestant's process is started with.")
def main(stages, dtypes, contestants, size, image_size, steps, rounds, path, job):
    if job:
        return work(Job(**json.loads(job)))
    config = SIZES[size]
    image_size = image_size or config.image_size
    if image_size < 1 or image_size % config.autoencoder.factor:
        raise click.BadParameter(
            f"must be a multiple of {config.autoencoder.factor}", param_hint="--image-size"
        )
    figures, skipped = [], []
    for stage in stages or STAGES:
        for dtype in dtypes or DTYPES:
            jobs = [
                Job(contestant, stage, dtype, size, image_size, steps)
                for contestant in contestants or CONTESTANTS
            ]
            workers, absent = compare(jobs, rounds)
            skipped += absent
            if workers:
                figures += rows(workers)
                click.echo(table([*rows(workers)]) + "\n")
    for one in skipped:
        click.echo("not run: {contestant}, {stage}, {dtype}: {why}".format(**one))
    if path:
        about = {"size": size, "image_size": image_size, "steps": steps, "rounds": rounds}
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        report = {**about, **machine, "versions": versions(), "rows": figures, "not_run": skipped}
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")
        click.echo(path)


if __name__ == "__main__":
    main()
