"""AdamW with the settings that the trainings here share."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("stable_diffusion_tf")
class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, a plateau at `rate`, and a linear decay to 0 over the last share of steps.

    Until the decay begins a run does not depend on `steps`, so it can still be made longer
    (Hu et al. 2024, arXiv:2404.06395, section 4).
    """

    def __init__(self, rate, steps, warmup=200, decay=0.25):
        self.rate, self.steps, self.warmup, self.decay = rate, steps, warmup, decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * ops.clip(ops.minimum(rising, falling), 0.0, 1.0)

    def get_config(self):
        names = ("rate", "steps", "warmup", "decay")
        return {name: getattr(self, name) for name in names}


def adamw(rate, steps, ema_momentum=0.999, loss_scaling=False):
    """AdamW (arXiv:1711.05101) that clips gradients and keeps a moving average of the weights.

    Args:
        rate: peak learning rate, reached after a warm-up and left for the last quarter of `steps`.
        ema_momentum: of the average; about the last 1 / (1 - momentum) steps count.
        loss_scaling: for float16, whose small gradients vanish otherwise.
    """
    optimizer = keras.optimizers.AdamW(
        WarmupStableDecay(rate, steps),
        weight_decay=1e-4,
        beta_2=0.99,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=ema_momentum,
    )
    return keras.optimizers.LossScaleOptimizer(optimizer) if loss_scaling else optimizer
