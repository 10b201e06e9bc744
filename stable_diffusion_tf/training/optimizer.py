"""The optimizers of the trainings here, with the settings that they share."""

import math
import re
from collections import defaultdict

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("stable_diffusion_tf")
class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, a plateau at `rate`, and a linear decay to 0 over the last share of steps.

    Until the decay begins a run does not depend on `steps`, so it can still be made longer
    (Hu et al. 2024, arXiv:2404.06395, section 4). The one exception: without `warmup` that is 200
    steps, or a tenth of a run of fewer than 2,000.
    """

    def __init__(self, rate, steps, warmup=None, decay=0.25):
        self.rate, self.steps, self.warmup, self.decay = rate, steps, warmup, decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warmup = min(200, self.steps // 10) if self.warmup is None else self.warmup
        rising = (step + 1) / max(1, warmup)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * ops.clip(ops.minimum(rising, falling), 0.0, 1.0)

    def same_before(self, step, steps) -> bool:
        """Whether a run of `steps` in all has had the same rates when `step` of them are done."""
        other = WarmupStableDecay(self.rate, steps, self.warmup, self.decay)
        done = np.arange(step)
        return np.array_equal(self(done), other(done))

    def get_config(self):
        names = ("rate", "steps", "warmup", "decay")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("stable_diffusion_tf")
class Muon(keras.optimizers.Muon):
    """Keras's Muon for convolutions too: a kernel is the matrix (height * width * in, out).

    The momentum of a matrix is replaced by the nearest orthogonal one, so that rare directions
    learn as fast as frequent ones (Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled
    to AdamW's rates as in Liu et al. 2025, arXiv:2502.16982). AdamW gets vectors; what has
    "embedding" in its path, the UNet's two kernels of `time_embedding` too, unless
    `exclude_embeddings` is False; and what `exclude_layers`, regular expressions, find in a path.
    """

    def _should_use_adamw(self, variable):
        excluded = self.exclude_embeddings and "embedding" in variable.path.lower()
        excluded |= any(re.search(layer, variable.path) for layer in self.exclude_layers)
        return len(variable.shape) < 2 or excluded

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Keras's, but matrices of one shape are orthogonalized together.

        Each takes dozens of small operations, which a GPU spends more time to begin than to do, and
        XLA to compile.
        """
        vectors, alike = [], defaultdict(list)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            own = vectors if self._should_use_adamw(variable) else alike[_matrix(variable.shape)]
            own.append((gradient, variable))
        for shape, pairs in alike.items():
            momenta = [ops.cast(self._momentum(*pair), "bfloat16") for pair in pairs]
            stacked = ops.stack([ops.reshape(momentum, shape) for momentum in momenta])
            stacked = self.zeropower_via_newtonschulz5(stacked, self.ns_steps)
            for (_, variable), update in zip(pairs, ops.unstack(stacked), strict=True):
                update = ops.cast(ops.reshape(update, variable.shape), variable.dtype)
                self.assign_sub(variable, self.lr_adjust(learning_rate * update))
        if vectors:
            super()._backend_update_step(*zip(*vectors, strict=True), learning_rate)

    def _momentum(self, gradient, variable):
        """Adds the gradient to the matrix's momentum: -> what is to be orthogonalized."""
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, gradient + self.momentum * momentum)
        return gradient + self.momentum * momentum if self.nesterov else momentum

    def lr_adjust(self, x):
        return x * (self.rms_rate * math.sqrt(max(_matrix(x.shape))))


def _matrix(shape):
    """Of a kernel, as the matrix that it is to `Muon`."""
    return math.prod(shape[:-1]), shape[-1]


def decaying(optimizer) -> WarmupStableDecay | None:
    """The optimizer's schedule, if it is one that depends on the number of steps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # as under loss scaling
    rate = inner._learning_rate  # `learning_rate` is its value; `get_config` warns on JAX
    return rate if isinstance(rate, WarmupStableDecay) else None


def adamw(rate, steps, ema_momentum=0.999, loss_scaling=False, warmup=None):
    """AdamW (arXiv:1711.05101) that clips gradients and keeps a moving average of the weights.

    Args:
        rate: peak learning rate, reached after a warm-up and left for the last quarter of `steps`.
        ema_momentum: of the average; about the last 1 / (1 - momentum) steps count. None: no
            average is kept.
        loss_scaling: for float16, whose small gradients vanish otherwise.
        warmup: steps; by default 200, at most a tenth of `steps`. Give it where a run of fewer than
            2,000 may be made longer: its warm-up would become another.
    """
    common = _common(rate, steps, ema_momentum, warmup)
    return _scaled(keras.optimizers.AdamW(beta_2=0.99, **common), loss_scaling)


def muon(rate, steps, ema_momentum=0.999, loss_scaling=False, warmup=None):
    """`Muon` with the settings of `adamw`: the same rates fit, fewer steps are needed."""
    common = _common(rate, steps, ema_momentum, warmup)
    decay = common["weight_decay"]
    return _scaled(Muon(adam_beta_2=0.99, adam_weight_decay=decay, **common), loss_scaling)


def _common(rate, steps, ema_momentum, warmup):
    return {
        "learning_rate": WarmupStableDecay(rate, steps, warmup),
        "weight_decay": 1e-4,
        "global_clipnorm": 1.0,
        "use_ema": ema_momentum is not None,
        "ema_momentum": ema_momentum,
    }


def _scaled(optimizer, loss_scaling):
    return keras.optimizers.LossScaleOptimizer(optimizer) if loss_scaling else optimizer
