"""Times our stages beside the other libraries that are installed here: seconds, ratios, memory.

\b
  text     a prompt of 77 tokens through the text encoder, whatever --batch says
  step     one guided step of --batch pictures: the UNet with the prompt and without
  decode   latents to pictures
  picture  whole ones, from the prompt: text, --steps guided steps, decode

Every contestant runs in a process of its own. Those of one stage, dtype and batch are loaded one
after the other; then they take turns, round by round, one at work while the others wait, so that a
machine that slows down slows all of them. A first run of each, which compiles, is not counted.
Weights are random: nothing is downloaded, and the time is that of real ones. Who is not installed,
lacks a stage, or dies, is named at the end.

\b
Contestants:
  ours                this package on Keras's backend (KERAS_BACKEND), by its public functions
  ours-jit            the same with jit_compile=True
  ours-openvino       the same with engine="openvino"
  diffusers           diffusers' networks and pipeline on PyTorch
  diffusers-compiled  the same through torch.compile, weights in channels-last format
  openvino            diffusers' networks, converted by openvino.convert_model
  keras-cv            KerasCV's networks on TensorFlow, which exist in one size: sd-1

Times are those of a whole batch, up to results in the host's memory. "per s" is prompts or pictures
a second, of a step the pictures that it moves on. "ours / it" is the median of the rounds' ratios,
the first contestant's seconds by this one's: below 1, the first is faster. Peak memory is the
process's while it runs, without loading, but for what "ours" has kept of it; at Stable Diffusion's
size, leave 5 GB for each contestant in float32, on OpenVINO 12. "ours" always has all four networks
in memory, the others those of the stage.

PyTorch, JAX and TensorFlow compute on a GPU if they find one, and peak memory is then what they
have allocated there since the start; OpenVINO stays on the CPU. The table names the device.

\b
Examples:
  python scripts/benchmark.py --size tiny
  python scripts/benchmark.py --stage step --dtype bfloat16 --contestant ours --contestant openvino
  python scripts/benchmark.py --stage decode --image-size 1024 --rounds 3 --json decode.json

\b
On a GPU, with JAX, diffusers and transformers, from a clone and without TensorFlow:
  KERAS_BACKEND=jax PYTHONPATH=. python scripts/benchmark.py --stage step --stage picture \\
    --dtype bfloat16 --batch 1 --batch 8 --contestant ours --contestant diffusers \\
    --contestant diffusers-compiled --json gpu.json
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
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
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
MIB = 2**20
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
SHARING = {  # contestants wait on the same GPU: each takes the memory that it needs, not all
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


class CannotRun(Exception):
    """Why a contestant takes no part."""


@dataclass(frozen=True)
class Job:
    """What one process does, again and again."""

    contestant: str
    stage: str
    dtype: str
    batch: int
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
    latents, context = job.latents(job.batch), job.context(job.batch)
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
        "picture": lambda: sd.generate(
            PROMPT, batch_size=job.batch, num_steps=job.steps, **drawing
        ),
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
            both = 2 * job.batch  # with the prompt and without
            timesteps = torch.full((both,), 981.0)
            inputs = channels_first(job.latents(both)), timesteps, torch.tensor(job.context(both))
            return module, lambda *inputs: module(*inputs, return_dict=False)[0], inputs
        if job.stage == "decode":
            module = self.vae()
            decoder = torch.nn.Sequential(module.post_quant_conv, module.decoder)
            return decoder, decoder, (channels_first(job.latents(job.batch)),)
        raise CannotRun(f"has no {job.stage} stage of its own")


def diffusers(job: Job, compiled: bool = False) -> Callable[[], Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job.dtype)
    layout = torch.channels_last if compiled else torch.preserve_format
    compiler = torch.compile if compiled else lambda function: function

    def placed(module):
        return module.to(device, dtype, memory_format=layout)

    reference = Reference(job)
    if job.stage == "picture":
        return _diffusers_picture(reference, placed, compiler)
    module, call, inputs = reference.network()
    placed(module)
    call = compiler(call)
    inputs = [
        x.to(device, dtype if x.ndim > 1 and x.is_floating_point() else x.dtype) for x in inputs
    ]

    @torch.inference_mode()
    def run():
        return call(*inputs).cpu()  # waits for the GPU

    return run


def _diffusers_picture(
    reference: Reference, placed: Callable, compiler: Callable
) -> Callable[[], Any]:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    job = reference.job
    vae = placed(reference.vae())
    vae.decoder = compiler(vae.decoder)
    text_encoder = compiler(placed(reference.text_encoder()))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,  # whose vocabulary would have to be downloaded
        unet=compiler(placed(reference.unet())),
        scheduler=DDIMScheduler.from_config(reference.files["scheduler/scheduler_config.json"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    ids = torch.tensor(job.token_ids, device=pipeline.device)

    @torch.inference_mode()
    def run():
        return pipeline(
            prompt_embeds=text_encoder(ids)[0],
            negative_prompt_embeds=text_encoder(ids)[0],
            num_images_per_prompt=job.batch,
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
    if (backend := os.environ["KERAS_BACKEND"]) != "tensorflow":
        raise CannotRun(f"needs TensorFlow; KERAS_BACKEND is {backend}")
    if job.size != "sd-1":
        raise CannotRun("has networks of one size, sd-1")
    if job.stage == "picture":
        raise CannotRun("would have to download a vocabulary")
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "0"  # as where this package is not imported
    os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)
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
        both = 2 * job.batch
        inputs = {
            "latent": job.latents(both),
            "timestep_embedding": job.normal(both, 320),
            "context": job.context(both),
        }
    else:
        network = decoder.Decoder(size, size, download_weights=False)
        inputs = job.latents(job.batch)
    return lambda: network.predict_on_batch(inputs)


@dataclass(frozen=True)
class Device:
    name: str
    peak_memory: Callable[[], float | None]
    """Most memory that the process has held there, in MiB."""


def cpu() -> Device:
    return Device("cpu", peak_memory)


def torch_device() -> Device:
    import torch

    if not torch.cuda.is_available():
        return cpu()
    return Device(torch.cuda.get_device_name(), lambda: torch.cuda.max_memory_allocated() / MIB)


def keras_device() -> Device:
    if os.environ["KERAS_BACKEND"] == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform == "cpu":
            return cpu()
        return Device(device.device_kind, lambda: device.memory_stats()["peak_bytes_in_use"] / MIB)
    from tensorflow import config

    if not (gpus := config.list_physical_devices("GPU")):
        return cpu()
    details, memory = config.experimental.get_device_details, config.experimental.get_memory_info
    return Device(details(gpus[0])["device_name"], lambda: memory("GPU:0")["peak"] / MIB)


CONTESTANTS: dict[str, tuple[Callable[[Job], Callable[[], Any]], Callable[[], Device]]] = {
    "ours": (ours, keras_device),
    "ours-jit": (partial(ours, jit_compile=True), keras_device),
    "ours-openvino": (partial(ours, engine="openvino"), cpu),
    "diffusers": (diffusers, torch_device),
    "diffusers-compiled": (partial(diffusers, compiled=True), torch_device),
    "openvino": (openvino, cpu),
    "keras-cv": (keras_cv, keras_device),
}


def work(job: Job) -> None:
    """A contestant's process: loads, then runs once for every line it gets, and says how long."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print

    def say(**message):
        print(json.dumps(message), file=out)

    try:
        build, find_device = CONTESTANTS[job.contestant]
        run, device = build(job), find_device()
        gc.collect()
        forget_peak()
        start = time.perf_counter()
        run()
    except (CannotRun, ImportError, RuntimeError) as error:  # such as no compiler
        traceback.print_exc()
        return say(cannot=str(error).partition("\n")[0] or type(error).__name__)
    say(first=time.perf_counter() - start, device=device.name)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        say(seconds=time.perf_counter() - start, peak=device.peak_memory())


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
        self.device: str | None = None
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
                env={**os.environ, **QUIET, **SHARING},
            )

    def warm_up(self) -> None:
        """Waits until it has loaded and run once."""
        answer = self._answer()
        self.first, self.device = answer["first"], answer["device"]

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


def label(job: Job) -> dict[str, Any]:
    """What tells one job of a report from another."""
    return {key: getattr(job, key) for key in ("stage", "dtype", "batch", "contestant")}


def compare(jobs: Iterable[Job], rounds: int) -> tuple[list[Worker], list[dict[str, str]]]:
    """Runs contestants of the same task in turn: those that did, and why others not."""
    workers: list[Worker] = []
    skipped = []

    @contextmanager
    def in_the_running(job: Job) -> Iterator[None]:
        try:
            yield
        except CannotRun as error:
            skipped.append({**label(job), "why": str(error)})
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
            **label(worker.job),
            "device": worker.device,
            "seconds": worker.seconds,
            "median": (median := statistics.median(worker.seconds)),
            "per_second": worker.job.batch / median,
            "ratio": statistics.median(first / own for first, own in pairs),
            "first_run": worker.first,
            "peak_mib": worker.peak,
        }


def table(figures: Sequence[dict[str, Any]]) -> str:
    first = figures[0]["contestant"]
    names = ("stage", "dtype", "batch", "contestant", "device")
    lines = [(*names, "median s", "min", "max", "per s", f"{first} / it", "peak MiB")]
    for row in figures:
        seconds = row["median"], min(row["seconds"]), max(row["seconds"])
        numbers = [f"{value:.4g}" for value in (*seconds, row["per_second"])]
        peak = "?" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append((*(str(row[key]) for key in names), *numbers, f"{row['ratio']:.2f}", peak))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < len(names) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def processor() -> str:
    with suppress(OSError, IndexError):  # Linux's
        lines = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()
        return lines[0].lstrip("\t: ")
    return platform.processor() or platform.machine()


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
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Pictures at a time; may be repeated.",
)
@click.option("--size", type=click.Choice(list(SIZES)), default="sd-1", show_default=True)
@click.option("--image-size", type=int, help="Of pictures, in pixels; the model's own.")
@click.option("--steps", default=20, show_default=True, help="Of a whole picture.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "path", type=Path, help="Also write everything to this file.")
@click.option("--work", "job", hidden=True, help="What a contestant's process is started with.")
def main(stages, dtypes, contestants, batches, size, image_size, steps, rounds, path, job):
    if job:
        return work(Job(**json.loads(job)))
    config = SIZES[size]
    image_size = image_size or config.image_size
    if image_size < 1 or image_size % config.autoencoder.factor:
        raise click.BadParameter(
            f"must be a multiple of {config.autoencoder.factor}", param_hint="--image-size"
        )
    figures, skipped = [], []
    tasks = [
        (stage, dtype, batch)
        for stage in stages or STAGES
        for dtype in dtypes or DTYPES
        for batch in (batches if stage != "text" else (1,))
    ]
    for task in tasks:
        jobs = [Job(one, *task, size, image_size, steps) for one in contestants or CONTESTANTS]
        workers, absent = compare(jobs, rounds)
        skipped += absent
        if workers:
            figures += rows(workers)
            click.echo(table([*rows(workers)]) + "\n")
    for one in skipped:
        click.echo("not run: {contestant}, {stage}, {dtype}, batch {batch}: {why}".format(**one))
    if path:
        about = {"size": size, "image_size": image_size, "steps": steps, "rounds": rounds}
        machine = {"processor": processor(), "cpus": os.cpu_count()}
        software = {"keras_backend": os.environ["KERAS_BACKEND"], "versions": versions()}
        report = {**about, **machine, **software, "rows": figures, "not_run": skipped}
        with atomic_path(path) as draft:
            draft.write_text(json.dumps(report, indent=1) + "\n")
        click.echo(path)


if __name__ == "__main__":
    main()
