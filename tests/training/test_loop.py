"""Training learns, saves, and goes on from a save as if nothing had happened."""

import csv
import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from small import run, weights

from stable_diffusion_tf.checkpoints import readers
from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.training import loop
from stable_diffusion_tf.training.ema import averaged, values
from stable_diffusion_tf.training.loop import LossLog, Saves, train
from stable_diffusion_tf.training.optimizer import Muon, WarmupStableDecay, adamw, decaying, muon


def line(name="line"):
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name=name)], name=name)


def line_fit(folder, steps, loss=lambda error: error, **options):
    """Fits y = 2 x with one dense layer by `loss(mean squared error)`; returns the model."""
    keras.utils.set_random_seed(0)
    model = line()
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]

    def batch(step):
        return (x,)

    options = {"optimizer": keras.optimizers.Adam(0.1), "progress": False, **options}
    optimizer = options.pop("optimizer")

    def squared_error(x):
        return loss(keras.ops.mean((model(x) - 2 * x) ** 2))

    train(squared_error, batch, [model], optimizer, steps=steps, folder=folder, **options)
    return model


def losses(folder):
    with open(folder / "loss.csv", newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_it_learns(tmp_path):
    kernel, bias = weights([line_fit(tmp_path, 200)])
    assert kernel.item() == pytest.approx(2, abs=0.01)
    assert bias.item() == pytest.approx(0, abs=0.01)
    assert losses(tmp_path)[-1][1] < 1e-3


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    whole = weights(run(tmp_path / "whole", 5))
    run(tmp_path / "pieces", 5, stop=2)
    pieces = weights(run(tmp_path / "pieces", 5))
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")


def test_a_finished_run_trains_no_further(tmp_path):
    before = weights([line_fit(tmp_path, 3)])
    after = weights([line_fit(tmp_path, 3, loss=lambda error: pytest.fail("trained again"))])
    assert before == after


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_learns_in_mixed_precision_with_float32_weights(tmp_path, dtype):
    models = run(tmp_path, 20, dtype=f"mixed_{dtype}", save_every=20)
    means = [loss for _, loss in losses(tmp_path)]
    assert np.mean(means[-10:]) < 0.9 * np.mean(means[:10])
    assert {weight.dtype for weight in weights(models)} == {np.dtype("float32")}
    text_encoder, unet = models
    zeros = keras.ops.zeros
    context = text_encoder(zeros((1, 77), "int32"))
    predicted = unet([zeros((1, 4, 4, 4)), zeros(1), context])
    for computed in (context, predicted):
        assert keras.backend.standardize_dtype(computed.dtype) == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_too_coarse_to_learn_are_refused_by_name(tmp_path, dtype):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, dtype=dtype, name="coarse")])
    refusal = rf"coarse/kernel is {dtype}, .*dtype=\"mixed_bfloat16\""
    with pytest.raises(ValueError, match=refusal):
        train(None, None, [model], adamw(0.1, 1), steps=1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("growth", "gradients", "expected"),
    [
        (1, [1, 1, 1, 1], [-1, -2, -3, -4]),  # the scale doubles after each step
        (100, [1e38, 1, 1, 1], [0, -1, -2, -3]),  # overflows once: a step left out, half the scale
    ],
    ids=["growing", "overflowing"],
)
def test_the_loss_is_scaled_as_its_gradients_are_unscaled(growth, gradients, expected):
    weight = keras.Variable(0.0)
    sgd = keras.optimizers.SGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(sgd, dynamic_growth_steps=growth)
    step = training_step(lambda gradient: weight * gradient, [weight], optimizer)
    found = []
    for gradient in gradients:
        step(np.float32(gradient))
        found.append(values([weight])[0].item())
    assert found == expected


@pytest.mark.parametrize("make", [adamw, muon])
def test_loss_scaling_can_be_asked_for(make):
    scaled, plain = (make(0.1, 3, loss_scaling=scaling) for scaling in (True, False))
    assert isinstance(scaled, keras.optimizers.LossScaleOptimizer)
    assert type(scaled.inner_optimizer) is type(plain)


def test_the_previous_save_is_kept_and_serves_when_the_last_is_gone(tmp_path):
    line_fit(tmp_path, 4, save_every=2)
    variables, optimizer = line().trainable_variables, keras.optimizers.Adam(0.1)
    optimizer.build(variables)
    saves = Saves(tmp_path, variables, optimizer)
    assert saves.restore() == 4
    saves.state.unlink()  # as when killed between the two renames
    assert saves.restore() == 2


def test_a_full_disk_is_told_and_the_last_save_is_kept(tmp_path, monkeypatch):
    def full(arrays, path, metadata):
        path.write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    line_fit(tmp_path, 2, save_every=2)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(readers, "save_file", full)
    with pytest.raises(OSError, match=r"state.safetensors could not be written: .*No space left"):
        line_fit(tmp_path, 4, save_every=2)
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.undo()
    line_fit(tmp_path, 4, save_every=2)
    assert [step for step, _ in losses(tmp_path)] == [2, 4]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_by_the_loss_log_too(tmp_path, monkeypatch):
    log = LossLog(tmp_path / "loss.csv", 0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    told = r"loss.csv could not be written: No space left.* Make room"
    with pytest.raises(OSError, match=told):
        log.write(1, 0.5)

    @contextmanager
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(loop, "atomic_path", full)
    with pytest.raises(OSError, match=told):
        LossLog(tmp_path / "new" / "loss.csv", 0)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_a_save_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        line_fit(tmp_path, 2, save_every=1)
    finally:
        os.umask(before)
    for name in ("state", "previous"):
        assert stat.S_IMODE((tmp_path / f"{name}.safetensors").stat().st_mode) == 0o640


def test_a_save_of_another_model_is_refused_by_name(tmp_path):
    line_fit(tmp_path, 1)
    optimizer = keras.optimizers.Adam(0.1)
    with pytest.raises(ValueError, match=r"state.safetensors is of another model.*other"):
        Saves(tmp_path, line("other").trainable_variables, optimizer).restore()


def test_a_save_of_another_recipe_is_refused_by_key(tmp_path):
    line_fit(tmp_path, 1, recipe={"norm": "l2", "rate": 0.1})
    message = r"state.safetensors is of another .*recipe.*first norm \(then 'l2', now 'l1'\)\."
    with pytest.raises(ValueError, match=message):
        line_fit(tmp_path, 2, recipe={"norm": "l1", "rate": 0.1})


def test_of_long_values_what_differs_is_shown_and_all_that_differs_is_counted(tmp_path):
    line_fit(tmp_path, 1, recipe={"config": f"{'a' * 99}(epsilon, {'b' * 99})"})
    state = Saves(
        tmp_path,
        line("other").trainable_variables,
        keras.optimizers.SGD(0.1),
        {"config": f"{'a' * 99}(v, {'b' * 99})", "seed": 1},
    )
    with pytest.raises(ValueError) as error:
        state.restore()
    message = str(error.value)
    assert f"(then …{'a' * 19}(epsilon, {'b' * 11}…, now …{'a' * 19}(v, {'b' * 17}…)" in message
    assert "), seed (then absent, now '1'), " in message
    assert re.search(r"differences: 1\d, ", message)  # and all variables


def test_a_damaged_save_is_named_with_the_one_before_it(tmp_path):
    line_fit(tmp_path, 4, save_every=2)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state.safetensors is damaged.*Delete it .*previous\."):
        line_fit(tmp_path, 4)


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is 0; ask for 1 or more"):
        line_fit(tmp_path, 0)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    line_fit(tmp_path, 3)
    with pytest.raises(ValueError, match="already at step 3, and 2 were asked for"):
        line_fit(tmp_path, 2)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_number_of_steps_can_change_until_the_decay_begins(tmp_path, scaled):
    def fit(steps, stop):
        optimizer = keras.optimizers.Adam(WarmupStableDecay(0.1, steps, warmup=1))
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        line_fit(tmp_path, stop, optimizer=optimizer)

    fit(8, stop=6)
    fit(16, stop=14)  # its last 4 steps decay: all but the first have another rate
    for steps in (15, 24):
        refusal = f"step 14 of 16, and a run of {steps} has other .* Train 16 steps in all"
        with pytest.raises(ValueError, match=refusal):
            fit(steps, stop=15)
    state = tmp_path / "state.safetensors"
    save_file(load_file(state), state, {"step": "14", "recipe": "{}"})  # as earlier saves are
    fit(24, stop=15)


def test_a_short_run_reaches_its_rate_and_a_long_one_warms_up_200_steps():
    for steps, warmup in ((5, 1), (20, 2), (1000, 100), (2000, 200), (5000, 200)):
        default, given = WarmupStableDecay(1.0, steps), WarmupStableDecay(1.0, steps, warmup)
        assert np.array_equal(default(np.arange(steps)), given(np.arange(steps)))
        assert float(default(warmup - 1)) == 1.0
    assert WarmupStableDecay(1.0, 2000).same_before(1500, 3000)
    assert not WarmupStableDecay(1.0, 1000).same_before(1, 2000)  # of which a tenth is more
    assert WarmupStableDecay(1.0, 1000, warmup=50).same_before(750, 2000)


@pytest.mark.parametrize("make", [adamw, muon])
def test_warm_up_and_average_can_be_chosen(make):
    optimizer = make(0.1, 100, ema_momentum=None, warmup=50)
    assert decaying(optimizer).warmup == 50
    assert not optimizer.use_ema


def test_the_rate_depends_on_the_number_of_steps_once_it_falls():
    rate = WarmupStableDecay(1.0, steps=400, warmup=10)  # falls after the update numbered 300
    assert rate.same_before(301, 800)
    assert not rate.same_before(302, 800)
    assert not WarmupStableDecay(1.0, steps=800, warmup=10).same_before(302, 400)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    line_fit(tmp_path, 1)
    optimizer = keras.optimizers.SGD(float("inf"))  # a finite loss, then an infinite step
    refusal = r"line/kernel is not finite at step 1\. Lower the learning rate"
    with pytest.raises(FloatingPointError, match=refusal):
        line_fit(tmp_path / "other", 1, optimizer=optimizer)
    assert not (tmp_path / "other" / "state.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    line_fit(tmp_path, 1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        line_fit(tmp_path, 2, loss=lambda error: error * float("nan"))
    assert np.isfinite(weights([line_fit(tmp_path, 1)])[0]).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_previews_see_the_averaged_weights(tmp_path, scaled):
    seen = []
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    kernel = model.trainable_variables[0]
    kernel.assign([[0.0]])
    # The gradient is -1: the kernel is 1 after one step, 2 after two; their average 1, then 1.5.
    train(
        lambda x: -keras.ops.sum(kernel.value) * 1.0,
        lambda step: (np.zeros((1, 1), np.float32),),
        [model],
        optimizer,
        steps=2,
        folder=tmp_path,
        save_every=1,
        preview=lambda step: seen.append(float(values([kernel])[0].item())),
        progress=False,
    )
    assert seen == [1.0, 1.5]
    assert values([kernel])[0].item() == 1.5  # the end result is the average, too


def test_repeated_tokens_are_clipped_by_the_sum_of_their_gradients(tmp_path):
    """As of a dense table: TensorFlow's gradient of an embedding has a row a token."""
    embedding = keras.layers.Embedding(2, 1, embeddings_initializer="zeros")
    model = keras.Sequential([keras.Input((4,)), embedding], name="table")
    train(
        lambda ids: -keras.ops.sum(model(ids)),
        lambda step: (np.zeros((1, 4), np.int32),),  # token 0, four times: its gradient is -4
        [model],
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        steps=1,
        folder=tmp_path,
        progress=False,
    )
    np.testing.assert_allclose(weights([embedding])[0], [[1.0], [0.0]], atol=1e-6)


def test_a_preview_may_predict(tmp_path):
    """On JAX, Keras frees the memory of what it predicts with: the average is not to be in it."""
    model, x = line(), np.ones((1, 1), np.float32)
    train(
        lambda x: keras.ops.mean(model(x) ** 2),
        lambda step: (x,),
        [model],
        adamw(0.1, 2),
        steps=2,
        folder=tmp_path,
        save_every=1,
        preview=lambda step: model.predict_on_batch(x),
        progress=False,
    )
    assert np.isfinite(model.predict_on_batch(x)).all()


def test_averaged_gives_the_weights_back_when_the_preview_fails():
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    variable = keras.Variable([3.0])
    for _ in range(2):  # to 2, the first average, then to 1
        optimizer.apply([keras.ops.ones(1)], [variable])
    with pytest.raises(RuntimeError), averaged(optimizer, [variable]):
        assert values([variable])[0] == [1.5]
        raise RuntimeError
    assert values([variable])[0] == [1.0]


def test_there_is_no_average_while_all_gradients_overflow(tmp_path):
    def overflow(error):
        return error * 1e36  # finite, but not times the loss's scale

    optimizer = adamw(0.1, 2, loss_scaling=True)
    kernel, _ = weights([line_fit(tmp_path, 2, loss=overflow, optimizer=optimizer)])
    assert int(optimizer.iterations) == 0
    keras.utils.set_random_seed(0)
    assert kernel == weights([line()])[0] != 0  # as it began


def test_a_torn_line_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "loss.csv"
    path.write_text("step,loss\n5,0.500000\n10,0.400000\n1")  # killed while writing step 15
    LossLog(path, start=10)
    assert path.read_text().split() == ["step,loss", "5,0.500000", "10,0.400000"]


def test_learning_rate_warms_up_stays_and_decays():
    rate = WarmupStableDecay(1.0, steps=100, warmup=10, decay=0.2)
    assert [float(rate(step)) for step in (0, 9, 50, 80, 90, 100)] == pytest.approx(
        [0.1, 1.0, 1.0, 1.0, 0.5, 0.0]
    )


def test_muon_turns_kernels_by_orthogonal_matrices_and_the_rest_as_adamw():
    shapes = {
        "conv": (3, 3, 4, 8),
        "dense": (8, 6),
        "other": (36, 8),
        "embedding": (5, 4),
        "bias": (4,),
    }
    variables = [keras.Variable(np.zeros(shape, "f"), name=n) for n, shape in shapes.items()]
    gradients = [np.random.default_rng(0).standard_normal(shape, "f") for shape in shapes.values()]
    optimizer = Muon(learning_rate=0.1, weight_decay=None, adam_weight_decay=None)
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)
    changes = values(variables)
    for change, gradient in zip(changes[:3], gradients[:3], strict=True):
        matrix, wanted = (x.reshape(-1, x.shape[-1]) for x in (-change, gradient))
        scales = np.linalg.svd(matrix / (0.1 * 0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
        assert scales.min() > 0.6 and scales.max() < 1.3  # as near to 1 as five iterations come
        u, _, v = np.linalg.svd(wanted, full_matrices=False)
        assert np.sum(matrix * (u @ v)) > 0.9 * np.linalg.norm(matrix) * np.linalg.norm(u @ v)
    for change, gradient in zip(changes[3:], gradients[3:], strict=True):
        np.testing.assert_allclose(change, -0.1 * np.sign(gradient), rtol=1e-3)


def test_muon_leaves_to_adamw_what_it_is_told_to():
    kernels = [keras.Variable(np.zeros((2, 2), "f"), name=n) for n in ("Embedding", "head", "in")]

    def adamws(**options):
        return [v.name for v in kernels if Muon(**options)._should_use_adamw(v)]

    assert adamws() == ["Embedding"]
    assert adamws(exclude_layers=["ea"]) == ["Embedding", "head"]
    assert adamws(exclude_embeddings=False) == []


def start(folder):
    """A fresh process that trains in `folder`."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    program = [sys.executable, Path(__file__).with_name("small.py"), folder, "400"]
    return subprocess.Popen(program, env={**os.environ, "PYTHONPATH": paths})


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.full
def test_killed_at_20_random_moments_it_ends_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = random.Random(0)
    for _ in range(20):
        process = start(killed)
        before, more = lines(killed / "loss.csv"), moments.randrange(8)
        while lines(killed / "loss.csv") < before + more and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it was killed 20 times"
    for process in (start(whole), start(killed)):
        assert process.wait() == 0
    expected, found = (load_file(folder / "state.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
