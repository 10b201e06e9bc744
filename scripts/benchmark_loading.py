"""Time and memory from a folder's path to the first UNet output: ours beside diffusers.

FOLDER is Stable Diffusion 1.x in the diffusers layout, float32; where there is none, one with
random weights is written (4 GB) and left for the next run. The pipeline is opened, its UNet loaded,
and one guided step drawn, 512x512. Each run is a process of its own, in turns, with the files in
the page cache. Time is counted from after the imports; memory is the highest while the UNet is
loaded, above that after the imports, over the UNet's own bytes. Needs Linux and the `parity` extra.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
from benchmark import forget_peak, peak_memory

CONTEXT = np.zeros((1, 77, 768), np.float32)


def ours():
    from stable_diffusion_tf import StableDiffusion

    def load(folder):
        sd = StableDiffusion.from_pretrained(folder)
        sd.diffusion_model  # noqa: B018 - loads it
        return sd

    def step(sd):
        sd.generate(
            None,
            context=CONTEXT,
            negative_context=CONTEXT,
            num_steps=1,
            output="latents",
            progress=False,
        )

    return load, step


def diffusers():
    import torch
    from diffusers import StableDiffusionPipeline

    def load(folder):
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)

    def step(pipeline):
        states = torch.from_numpy(CONTEXT)
        pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=states,
            num_inference_steps=1,
            output_type="latent",
        )

    return load, step


CONTESTANTS = {"ours": ours, "diffusers": diffusers}


def measure(contestant: str, folder: Path) -> dict[str, float]:
    load, step = CONTESTANTS[contestant]()
    forget_peak()
    before, start = peak_memory(), time.perf_counter()
    pipeline = load(folder)
    loaded, peak = time.perf_counter(), peak_memory()
    step(pipeline)
    done = time.perf_counter()
    weights = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
    return {
        "loading, s": loaded - start,
        "to the first output, s": done - start,
        "memory / weights": (peak - before) * 2**20 / weights,
    }


@click.command(help=__doc__)
@click.argument("folder", type=Path)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--contestant", type=click.Choice(list(CONTESTANTS)), hidden=True)
def main(folder: Path, rounds: int, contestant: str | None) -> None:
    if contestant:
        click.echo(json.dumps(measure(contestant, folder)))
        return
    if not folder.exists():
        from stable_diffusion_tf import StableDiffusion

        click.echo(f"Writing {folder}")
        StableDiffusion(download_weights=False).save_pretrained(folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for file in folder.rglob("*.safetensors"):
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    for _ in range(rounds):
        for name, figures in runs.items():
            command = [sys.executable, __file__, folder, "--contestant", name]
            figures.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    for figure in runs["ours"][0]:
        ours, theirs = ([run[figure] for run in runs[name]] for name in ("ours", "diffusers"))
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        click.echo(
            f"{figure:24} ours {median(ours):6.2f}  diffusers {median(theirs):6.2f}"
            f"  ratio {ratio:5.2f}"
        )


if __name__ == "__main__":
    main()
