"""The training loop: the same bits whether or not a run was interrupted."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pockjax as pj
from pockjax.data import Encoded, Loader
from tests.training.test_step import MASK, WIDTH, mlp_loss, mlp_params

EXAMPLES, SIZE = 10, 4


def loader(seed: int = 0, examples: int = EXAMPLES) -> Loader[Encoded]:
    tokens = np.random.default_rng(5).integers(0, 9, (examples, WIDTH))
    return Loader(Encoded(tokens, tokens >= 0, tokens[:, 0]), size=SIZE, seed=seed)


def arguments(batch: Encoded) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(batch.tokens, np.float32) / 9
    return x, np.roll(x, 1, axis=1)


def step_and_state(**changes: Any) -> tuple[pj.Step, pj.State]:
    params, x = mlp_params(), jnp.ones((SIZE, WIDTH))
    step = pj.compile(mlp_loss, MASK, optax.adam(1e-2), params, x, x, **changes)
    return step, step.init(params)


def run(step: pj.Step, state: pj.State, steps: int = 9, **given: Any) -> pj.Fit:
    given = {"progress": False, "arguments": arguments, "batches": loader(), **given}
    return pj.fit(step, state, steps=steps, **given)


class Lost(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, stop: int) -> None:
    step, state = step_and_state()
    whole = run(step, state)

    def lose(done: int, metrics: pj.Metrics) -> None:
        if done == stop:
            raise Lost

    for _ in range(2):  # what was not written is done again
        with pytest.raises(Lost):
            run(step, step.init(mlp_params()), checkpoint=tmp_path, every=2, on_step=lose)
    resumed = run(step, step.init(mlp_params()), checkpoint=tmp_path, every=2)
    chex.assert_trees_all_equal(resumed.state, whole.state)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


def test_batches_of_a_list_are_gone_over_again_and_resumed(tmp_path: Path) -> None:
    step, state = step_and_state()
    batches = [arguments(batch) for batch in loader()]
    given: dict[str, Any] = {"batches": batches, "arguments": tuple}
    whole = run(step, state, 7, **given)
    run(step, step.init(mlp_params()), 3, checkpoint=tmp_path, **given)
    resumed = run(step, step.init(mlp_params()), 7, checkpoint=tmp_path, **given)
    chex.assert_trees_all_equal(resumed.state, whole.state)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a process of the foreground; shells let those of the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_step_and_writes_the_checkpoint(tmp_path: Path) -> None:
    step, state = step_and_state()
    whole = run(step, state)

    def interrupt(done: int, metrics: pj.Metrics) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(step, step.init(mlp_params()), checkpoint=tmp_path, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    resumed: list[int] = []
    end = run(
        step, step.init(mlp_params()), checkpoint=tmp_path, on_step=lambda n, _: resumed.append(n)
    )
    assert resumed[0] == 4
    chex.assert_trees_all_equal(end.state, whole.state)


def test_keys_and_half_precision_survive(tmp_path: Path) -> None:
    params = mlp_params(dtype=jnp.bfloat16)
    x = jnp.ones((SIZE, WIDTH), jnp.bfloat16)

    def loss(params: Any, x: Any, key: Any) -> Any:
        return mlp_loss(params, x * jax.random.bernoulli(key, 0.5, x.shape), x)

    step = pj.compile(loss, MASK, optax.adam(0.1), params, x, key=jax.random.key(1))
    whole = pj.fit(step, step.init(params), [(x,)], steps=4, progress=False)
    pj.fit(step, step.init(params), [(x,)], steps=2, checkpoint=tmp_path, progress=False)
    other = step.init(params, key=jax.random.key(7))
    resumed = pj.fit(step, other, [(x,)], steps=4, checkpoint=tmp_path, progress=False)
    chex.assert_trees_all_equal(resumed.state, whole.state)


def test_the_cached_front_trains_as_the_whole(tmp_path: Path) -> None:
    params = mlp_params()
    prefix, suffix = pj.split(mlp_loss, MASK)
    x = jnp.ones((SIZE, WIDTH))
    features = prefix(params, x, x)
    step = pj.compile(suffix, MASK, optax.adam(1e-2), params, features)
    cache = pj.FeatureCache(prefix, params, folder=tmp_path)
    cached = run(step, step.init(params), cache=cache)
    whole = run(*step_and_state())
    np.testing.assert_allclose(cached.losses, whole.losses, rtol=1e-5)
    assert cache.hits > cache.misses > 0
    # A later run over the same examples in another order finds them all.
    again = pj.FeatureCache(prefix, params, folder=tmp_path)
    run(step, step.init(params), cache=again, batches=loader(seed=3), steps=4)
    assert again.hits >= again.misses


def test_a_step_can_be_compiled_without_its_front(tmp_path: Path) -> None:
    params, x = mlp_params(), jnp.ones((SIZE, WIDTH))
    step = pj.compile(mlp_loss, MASK, optax.adam(1e-2), params, x, x, prefix=True)
    whole = run(*step_and_state())
    kept = run(step, step.init(params), cache=tmp_path)
    np.testing.assert_allclose(kept.losses, whole.losses, rtol=1e-5)
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    in_memory = run(step, step.init(params))
    np.testing.assert_array_equal(in_memory.losses, kept.losses)
    assert step.prefix is not None
    _, metrics = step(step.init(params), step.prefix(params, x, x))
    np.testing.assert_allclose(metrics.loss, mlp_loss(params, x, x), rtol=1e-5)


def test_models_with_functions_and_batches_with_constants_have_fronts_too() -> None:
    params = {"f": jnp.tanh, "front": jnp.eye(WIDTH), "head": jnp.ones((WIDTH, 1))}
    mask = {"f": False, "front": False, "head": True}

    def loss(params: Any, x: Any, y: Any, doubled: bool) -> Any:
        out = params["f"](x @ params["front"]) @ params["head"]
        return (2 if doubled else 1) * jnp.mean((out - y[:, :1]) ** 2)

    data = [(x, y, True) for x, y in pairs()]
    given: dict[str, Any] = {"batches": data, "arguments": tuple}
    losses = []
    for prefix in (False, True):
        step = pj.compile(loss, mask, optax.adam(0.1), params, *data[0], prefix=prefix)
        losses.append(run(step, step.init(params, donate=False), **given).losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_what_has_no_front_to_leave_out_is_refused(tmp_path: Path) -> None:
    step, state = step_and_state()
    assert step.prefix is None
    with pytest.raises(ValueError, match="prefix=True"):
        run(step, state, cache=tmp_path)
    params, x = mlp_params(), jnp.ones((SIZE, WIDTH))
    with pytest.raises(ValueError, match="nothing is frozen"):
        pj.compile(mlp_loss, True, optax.sgd(0.1), params, x, x, prefix=True)
    options: list[dict[str, Any]] = [
        {"accumulate": 2},
        {"key": jax.random.key(0)},
        {"frozen_dtype": "bfloat16"},
        {"has_aux": True, "merge_aux": lambda params, aux: params},
    ]
    for given in options:
        with pytest.raises(ValueError, match=f"cannot have {list(given)[-1]}"):
            pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, x, prefix=True, **given)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    step, state = step_and_state()
    run(step, state, 2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="position is one in"):
        run(step, step.init(mlp_params()), checkpoint=tmp_path, batches=loader(examples=12))
    with pytest.raises(ValueError, match="over another first batch"):
        run(step, step.init(mlp_params()), checkpoint=tmp_path, batches=[1])
    x = jnp.ones((SIZE, WIDTH))
    other = pj.compile(mlp_loss, MASK, optax.sgd(0.1), mlp_params(), x, x)
    with pytest.raises(ValueError, match="another step.*opt_state"):
        run(other, other.init(mlp_params()), checkpoint=tmp_path)
    (tmp_path / "state.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        run(step, step.init(mlp_params()), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="no more batches"):
        run(step, step.init(mlp_params()), batches=iter(loader()), steps=5)


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run(*step_and_state(), steps=3, progress=True)
    assert "training: 3 of 3 done, loss " in capsys.readouterr().err


def test_many_steps_in_one_call_equal_as_many_calls() -> None:
    step, state = step_and_state()
    batches = [arguments(batch) for batch in _endless(5)]
    stacked = [np.stack(column) for column in zip(*batches, strict=True)]
    many, metrics = step.many(state, *stacked)
    state, losses = step.init(mlp_params()), []
    for given in batches:
        state, one = step(state, *given)
        losses.append(float(one.loss))
    chex.assert_trees_all_close(many, state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, losses, rtol=1e-5)
    with pytest.raises(ValueError, match="first axis of steps"):
        step.many(many, stacked[0], stacked[1][:2])
    with pytest.raises(TypeError, match="batch argument 0"):
        step.many(many, stacked[0][..., :3], stacked[1])


def _endless(count: int) -> Iterator[Encoded]:
    source = loader().endless()
    for _ in range(count):
        yield next(source)


def test_measures_on_a_copy_and_reports_it() -> None:
    step, state = step_and_state()
    x = jnp.ones((SIZE, WIDTH))
    assert step.report.measured is None
    found = step.measure(state, x, x, steps=7)
    assert found.steps == 7 and 0 < found.low <= found.seconds <= found.high
    assert found.temp_bytes == step.report.compiled.temp_bytes
    assert step.report.measured == found and str(found) in str(step.report)
    assert int(state.step) == 0
    with pytest.raises(ValueError, match="at least one"):
        step.measure(state, x, x, steps=0)


def pairs(count: int = 3, scale: float = 1.0) -> list[tuple[jax.Array, jax.Array]]:
    x = jax.random.normal(jax.random.key(0), (count, SIZE, WIDTH))
    return [(scale * one, jnp.roll(one, 1, axis=1)) for one in x]


def test_no_run_goes_on_over_other_data_or_under_another_mask(tmp_path: Path) -> None:
    step, state = step_and_state()
    given: dict[str, Any] = {"arguments": tuple, "checkpoint": tmp_path}
    run(step, state, 3, batches=pairs(), **given)
    with pytest.raises(ValueError, match="over another first batch"):
        run(step, step.init(mlp_params()), 6, batches=pairs(scale=2.0), **given)
    x = jnp.ones((SIZE, WIDTH))
    params = {"w": jnp.ones((WIDTH, 4))}

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["w"]) ** 2)

    for k, indices in enumerate(([0, 2], [1, 3])):
        one = pj.compile(loss, {"w": pj.part[:, indices]}, optax.adam(1e-2), params, x, x)
        given["checkpoint"] = tmp_path / "masks"
        if k == 0:
            run(one, one.init(params), 3, batches=pairs(), **given)
        else:
            with pytest.raises(ValueError, match="over another mask"):
                run(one, one.init(params), 6, batches=pairs(), **given)


def test_any_damage_to_a_checkpoint_is_named(tmp_path: Path) -> None:
    step, state = step_and_state()
    given: dict[str, Any] = {"arguments": tuple, "checkpoint": tmp_path, "batches": pairs()}
    run(step, state, 3, **given)
    [file] = tmp_path.iterdir()
    whole, generator = file.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(len(damaged))] ^= 1 << int(generator.integers(8))
        file.write_bytes(bytes(damaged))
        try:
            run(step, step.init(mlp_params()), 3, **given)
        except ValueError as error:
            assert str(file) in str(error)
