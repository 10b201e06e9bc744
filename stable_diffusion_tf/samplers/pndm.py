from itertools import pairwise

# Adams-Bashforth's, newest first
WEIGHTS = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(denoise, x, steps, noise, *, prediction="epsilon"):
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778, equations 11 and 12).

    DDIM's step with the network's last four outputs combined. Without the paper's Runge-Kutta
    start, as latent diffusion has it: the first step is taken again, with the mean of the outputs
    at its two ends. `prediction` says which outputs are combined, "epsilon" or "v"; `noise` is
    never drawn.
    """
    outputs = []
    for i, (now, after) in enumerate(pairwise(steps)):
        x0 = denoise(x, now)
        outputs = [_output(x, x0, now, prediction), *outputs[:3]]
        mixed = sum(
            w * output for w, output in zip(WEIGHTS[len(outputs) - 1], outputs, strict=True)
        )
        ahead = _move(x, mixed, now, getattr(now, "below", after), prediction)
        if i == 0 and len(steps) > 2:
            x0 = denoise(ahead, after)
            mixed = (mixed + _output(ahead, x0, after, prediction)) / 2
            ahead = _move(x, mixed, getattr(after, "above", now), after, prediction)
        x = ahead
        yield x, x0


def _output(x, x0, step, prediction):
    """Returns what the network said, of which x0 was found."""
    if prediction == "v":
        return (step.alpha * x - x0) / step.sigma
    return (x - step.alpha * x0) / step.sigma


def _move(x, output, now, after, prediction):
    """Returns where x at `now` gets to at `after` (equation 11), if the network says `output`."""
    if prediction == "v":
        x0, eps = now.alpha * x - now.sigma * output, now.alpha * output + now.sigma * x
    else:
        x0, eps = (x - now.sigma * output) / now.alpha, output
    return after.alpha * x0 + after.sigma * eps
