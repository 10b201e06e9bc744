"""scripts/average_models.py: the mean of two models, by hand and as a folder."""

import average_models
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny import FILES


def run(*arguments):
    return CliRunner().invoke(average_models.main, [*map(str, arguments)])


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_mean_of_a_model_and_of_its_double(tiny_model, tiny_folder, tmp_path, share):
    for file in FILES.values():
        tensors = load_file(tiny_folder / file)
        save_file({name: 3 * tensor for name, tensor in tensors.items()}, tiny_folder / file)
    result = run(tiny_model, tiny_folder, tmp_path / "mean", f"--share={share}")
    assert result.exit_code == 0, result.output
    for file in FILES.values():
        before, mean = load_file(tiny_model / file), load_file(tmp_path / "mean" / file)
        assert before.keys() == mean.keys()
        for name, tensor in before.items():
            expected = (1 + 2 * share) * tensor.astype(np.float32)
            np.testing.assert_allclose(mean[name], expected, rtol=1e-3, atol=1e-6)


def test_models_of_other_configs_and_targets_that_exist_are_refused(
    tiny_model, tiny_inpainting, tmp_path
):
    refused = run(tiny_model, tiny_inpainting, tmp_path / "mean")
    assert refused.exit_code == 2 and "differ in their configs" in refused.output
    refused = run(tiny_model, tiny_model, tmp_path)
    assert refused.exit_code == 2 and "exists. Name another target" in refused.output
    assert not (tmp_path / "mean").exists()
