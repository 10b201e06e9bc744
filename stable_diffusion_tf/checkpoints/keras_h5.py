"""The published h5 files of the earlier Keras port and of KerasCV: a file a network.

Their weights are found by order, the order in which the networks call their layers: the names in
them are numbers that say nothing. Both libraries' layouts are one but for one layer's place.
"""

import re
from collections.abc import Sequence
from typing import Any

from stable_diffusion_tf.checkpoints.fit import Match, listed, misfit, refuse
from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.config import ModelConfig

# Siblings in the order they are called in.
ORDER = (
    "post_quant_conv decoder",
    "embeddings token_embedding position_embedding encoder layers final_layer_norm",
    "layer_norm1 self_attn q_proj k_proj v_proj out_proj layer_norm2 mlp fc1 fc2",
    "time_embedding linear_1 conv_in linear_2 down_blocks mid_block up_blocks",
    "resnets attentions downsamplers upsamplers",
    "group_norm norm proj_in transformer_blocks proj_out",
    "norm1 attn1 conv1 time_emb_proj norm2 attn2 conv2 conv_shortcut norm3 ff net proj",
    "to_q to_k to_v to_out",
    "conv conv_norm_out conv_out quant_conv",
    "kernel gamma bias beta",
)
RANK = {word: rank for rank, word in enumerate(" ".join(ORDER).split())}


def place(path: str) -> list[tuple[int, int]]:
    """What to sort variables by: numbers before words, so that a resnet's attention follows it."""
    path = re.sub(r"(resnets|attentions)\.(\d+)", r"\2.\1", path)
    return [(0, int(w)) if w.isdigit() else (1, RANK[w]) for w in re.split(r"[./]", path)]


def functional_place(path: str) -> list[tuple[int, int]]:
    """The same in KerasCV's UNet, where `conv_in` is between the time embedding's two layers."""
    return place(path.replace("time_embedding.linear_2", "linear_2"))


class InOrder:
    """Finds each variable's tensor by its place among all of them."""

    def match(self, variables: Sequence[Any], file: TensorFile) -> list[Match]:
        """As `Table.match`: all variables, all tensors, all shapes, or one error."""
        names = file.names
        functional = len(names) > 2 and len(file.shape(names[2])) == 4
        order = functional_place if functional else place
        ordered = sorted(variables, key=lambda variable: order(variable.path))
        matches, misfits = [], []
        for variable, name in zip(ordered, names, strict=False):
            shape = tuple(variable.shape)
            found = file.shape(name)
            if not re.search(rf"/{variable.path.rpartition('/')[2]}:0$", name):
                misfits.append(f"{name} is where {variable.path} should be")
            else:
                pointwise = len(shape) == 2 and found == (1, 1, *shape)
                misfits += misfit(file, name, found if pointwise else shape)
            matches.append(Match(variable, file, name, shape, tuple(range(len(shape)))))
        refuse(
            file,
            [
                *listed("missing at its end", [v.path for v in ordered[len(names) :]]),
                *listed("not part of the model", names[len(ordered) :]),
                *listed("of the wrong shape or type", misfits),
            ],
        )
        return matches


def part(file: TensorFile) -> str:
    """Which network a file holds.

    Raises:
        CheckpointError: none of Stable Diffusion's.
    """
    names = file.names
    first, last = file.shape(names[0]), file.shape(names[-2:][0])  # the last is a bias
    if names[0].endswith("embeddings:0") and len(first) == 2:
        return "text_encoder"
    if len(first) == 2:
        return "unet"
    if len(first) == 4 and first[2] == 3:
        return "encoder"
    if len(last) == 4 and last[3] == 3:
        return "decoder"
    raise CheckpointError(f"{file.path} is an h5 file, but no network of Stable Diffusion.")


def tables(config: ModelConfig, file: TensorFile, ema: bool = False) -> dict[str, InOrder]:
    return {part(file): InOrder()}
