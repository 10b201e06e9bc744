"""Low-rank adaptation: a thousandth of the UNet's weights to train in place of all."""

import re
from numbers import Integral

import keras

PROJECTIONS = r"\.attn\d\.to_(q|k|v|out\.0)$"  # the layers of a transformer's attention, by name


def enable_lora(unet: keras.Model, rank: int):
    """Freezes the UNet and adds to its attentions' projections products of two narrow matrices.

    Those are all that is trained (Hu et al. 2021, arXiv:2106.09685); the products are 0 at first.
    Drawing and saving see the sums.

    Args:
        unet: a `UNet`.
        rank: of each product; of a kernel of 320 x 320, rank 4 trains 2 x 320 x 4 weights.

    Raises:
        ValueError: `rank` is no whole number of 1 or more; or the model has no such projections, or
            has such products already.
    """
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number, 1 or more, not {rank!r}")
    adapted = [layer for layer in unet.layers if re.search(PROJECTIONS, layer.name)]
    if not adapted:
        raise ValueError(f"{unet.name} has no attentions' projections to add to; give a UNet")
    if any(layer.lora_enabled for layer in adapted):
        raise ValueError(f"{unet.name} has LoRA already; load it again for another rank")
    for layer in unet.layers:
        if layer in adapted:
            for weight in layer.weights:  # the bias too, which Keras would leave to be trained
                weight.trainable = False
            layer.enable_lora(rank)
        else:
            layer.trainable = False
