"""scripts/swap_autoencoder.py: what a UNet takes for latents when the autoencoder is another."""

import numpy as np
import pytest
import swap_autoencoder
from click.testing import CliRunner
from emoji_data import Row

from stable_diffusion_tf.checkpoints.load import load
from stable_diffusion_tf.checkpoints.save import save


@pytest.fixture
def orthogonal():
    return np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]


def test_the_rotation_between_latents_is_found(orthogonal):
    wanted = np.random.default_rng(1).standard_normal((2, 8, 8, 4))
    found = swap_autoencoder.rotation(wanted @ orthogonal.T, wanted)
    np.testing.assert_allclose(found, orthogonal, atol=1e-12)


def test_a_turned_unet_answers_turned_latents_as_it_did_the_others(tiny_model, orthogonal):
    unet, width = load(tiny_model).unet, load(tiny_model).config.unet.context_width
    rng = np.random.default_rng(2)
    latents = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    rest = np.array([7.0], np.float32), rng.standard_normal((1, 5, width)).astype(np.float32)
    expected = unet.predict_on_batch([latents, *rest])
    swap_autoencoder.turn(unet, orthogonal)
    turned = unet.predict_on_batch([(latents @ orthogonal.T).astype(np.float32), *rest])
    np.testing.assert_allclose(turned, expected @ orthogonal.T, rtol=1e-4, atol=1e-5)


def test_a_folder_that_has_the_others_autoencoder(tiny_model, tmp_path, monkeypatch):
    rows = [Row("noto", "noto", "p", "i", f"{i:x}", "thing", (), "", "train") for i in range(4)]
    size = load(tiny_model).config.image_size
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    monkeypatch.setattr(swap_autoencoder.emoji_data, "load", lambda size, cache: (rows, images))

    # The same autoencoder, but for the latents, which are negated.
    models = load(tiny_model)
    moments, first = (
        models.encoder.get_layer("quant_conv"),
        models.decoder.get_layer("post_quant_conv"),
    )
    negated = np.repeat(np.float32([-1, 1]), 4)  # means, not variances
    moments.kernel.assign(moments.kernel * negated)
    moments.bias.assign(moments.bias * negated)
    first.kernel.assign(-1 * first.kernel)
    save(models, tmp_path / "other")

    arguments = [tiny_model, tmp_path / "other" / "vae", tmp_path / "swapped"]
    result = CliRunner().invoke(swap_autoencoder.main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    swapped, before = load(tmp_path / "swapped"), load(tiny_model)
    for name in ("conv_in", "conv_out"):
        kernel, own = (m.unet.get_layer(name).kernel for m in (swapped, before))
        np.testing.assert_allclose(kernel, -1 * own, rtol=1e-2, atol=1e-3)
    kernel, own = (m.decoder.get_layer("post_quant_conv").kernel for m in (swapped, before))
    np.testing.assert_allclose(kernel, -1 * own, rtol=1e-2, atol=1e-3)


def test_what_has_no_such_latents_is_refused(tiny_model, tiny_inpainting, tmp_path):
    arguments = [tiny_inpainting, tiny_model / "vae", tmp_path / "target"]
    refused = CliRunner().invoke(swap_autoencoder.main, [*map(str, arguments)])
    assert refused.exit_code == 2 and "its UNet takes more than latents" in refused.output
    assert not (tmp_path / "target").exists()
