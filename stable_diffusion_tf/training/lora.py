"""Low-rank adaptation: a thousandth of the UNet's weights to train in place of all."""

import re

import keras

PROJECTIONS = r"\.attn\d\.to_(q|k|v|out\.0)$"  # the layers of a transformer's attention, by name


def enable_lora(unet: keras.Model, rank: int):
    """Freezes the UNet and adds to its attentions' projections products of two narrow matrices.

    Those are all that is trained (Hu et al. 2021, arXiv:2106.09685); the products are 0 at first.
    Drawing and saving see the sums.

    Args:
        unet: a `UNet`.
        rank: of each product; of a kernel of 320 x 320, rank 4 trains 2 x 320 x 4 weights.
    """
    for layer in unet.layers:
        if re.search(PROJECTIONS, layer.name):
            for weight in layer.weights:  # the bias too, which Keras would leave to be trained
                weight.trainable = False
            layer.enable_lora(rank)
        else:
            layer.trainable = False
