"""Feature reuse (DeepCache: Ma et al. 2023, arXiv:2312.00858): the UNet's deep part, now and then.

From step to step, what its deep levels say of a picture changes little. So they are run at every
n-th call, the first among them, and what they said is kept for the calls between.
"""

from collections.abc import Callable
from itertools import count


def reusing(whole: Callable, shallow: Callable, every: int) -> Callable:
    """Returns a denoiser that runs the whole network at every n-th call; for one run of a sampler.

    Args:
        whole: `whole(*args) -> (x0, deep)`.
        shallow: `shallow(*args, deep) -> x0`, given the features of the last whole call.
        every: n, 1 or more.
    """
    calls, deep = count(), None

    def denoise(*args):
        nonlocal deep
        if next(calls) % every:
            return shallow(*args, deep)
        x0, deep = whole(*args)
        return x0

    return denoise
