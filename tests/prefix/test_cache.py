"""Features are kept by content, within bounds, and never used for anything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pockjax as pj

PARAMS = {
    "front": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32),
    "head": jnp.ones((8, 1)),
}
MASK = {"front": False, "head": True}
EXAMPLES = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
LABELS = np.arange(12, dtype=np.float32)[:, None]
ROW = 8 * 4  # bytes of one example's features


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["front"]) @ params["head"] - y) ** 2)


def make(params=PARAMS, **kwargs):
    prefix, suffix = pj.split(loss, MASK)
    return pj.FeatureCache(prefix, params, **kwargs), suffix


def check(cache, suffix, indices, params=PARAMS, examples=EXAMPLES, rtol=1e-6):
    batch = examples[indices], LABELS[indices]
    found = suffix(params, cache(*batch))
    np.testing.assert_allclose(found, loss(params, *batch), rtol=rtol)


def test_epochs_in_any_order():
    cache, suffix = make()
    generator = np.random.default_rng(2)
    for _ in range(3):
        for indices in generator.permutation(12).reshape(3, 4):
            check(cache, suffix, indices)
    assert (cache.misses, cache.hits) == (12, 24)
    assert cache.nbytes == 12 * ROW


def test_labels_are_those_of_the_batch():
    cache, suffix = make()
    check(cache, suffix, np.arange(4))
    x = EXAMPLES[:4]
    found = suffix(PARAMS, cache(x, LABELS[4:8]))
    np.testing.assert_allclose(found, loss(PARAMS, x, LABELS[4:8]), rtol=1e-6)
    assert cache.hits == 4


def test_changed_examples_are_other_examples():
    cache, suffix = make()
    check(cache, suffix, np.arange(4))
    changed = EXAMPLES.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], 9)
    check(cache, suffix, np.arange(4), examples=changed)
    assert (cache.hits, cache.misses) == (3, 5)


def test_a_later_run_goes_on(tmp_path):
    cache, suffix = make(folder=tmp_path)
    check(cache, suffix, np.arange(8))
    cache, suffix = make(folder=tmp_path)
    check(cache, suffix, np.arange(12)[::-1])
    assert (cache.hits, cache.misses) == (8, 4)


def test_functions_in_the_front_are_known_by_what_they_do(tmp_path):
    """The program of a custom gradient names functions by where they are in memory."""
    for run in range(2):
        activation = jax.custom_vjp(lambda x: jnp.maximum(x, 0))
        activation.defvjp(lambda x: (jnp.maximum(x, 0), x > 0), lambda kept, ct: (ct * kept,))

        def loss(params, x, y, activation=activation):
            return jnp.mean((activation(x @ params["front"]) @ params["head"] - y) ** 2)

        prefix, _ = pj.split(loss, MASK)
        cache = pj.FeatureCache(prefix, PARAMS, folder=tmp_path)
        cache(EXAMPLES[:4], LABELS[:4])
        assert cache.hits == 4 * run


def test_other_weights_are_another_front(tmp_path):
    cache, suffix = make(folder=tmp_path)
    check(cache, suffix, np.arange(4))
    other = PARAMS | {"front": PARAMS["front"].at[0, 0].add(1e-3)}
    cache, suffix = make(other, folder=tmp_path)
    check(cache, suffix, np.arange(4), params=other)
    assert cache.hits == 0
    # Trained weights are no part of it.
    trained = PARAMS | {"head": 2 * PARAMS["head"]}
    cache, suffix = make(trained, folder=tmp_path)
    check(cache, suffix, np.arange(4), params=trained)
    assert cache.hits == 4


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * (ROW + 16)])
def test_damaged_files_are_computed_again(tmp_path, damage):
    cache, suffix = make(folder=tmp_path)
    check(cache, suffix, np.arange(4))
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) == 4
    files[0].write_bytes(damage)
    cache, suffix = make(folder=tmp_path)
    check(cache, suffix, np.arange(4))
    assert (cache.hits, cache.misses) == (3, 1)


def test_memory_is_bounded():
    cache, suffix = make(memory=5 * ROW)
    for indices in np.arange(12).reshape(3, 4):
        check(cache, suffix, indices)
        assert cache.nbytes <= 5 * ROW
    check(cache, suffix, np.arange(8, 12))
    assert (cache.hits, cache.misses) == (4, 12)
    cache.clear()
    assert cache.nbytes == 0


def test_disk_is_bounded(tmp_path):
    cache, suffix = make(folder=tmp_path, disk=3 * (ROW + 16))
    check(cache, suffix, np.arange(12))
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == 3
    cache, suffix = make(folder=tmp_path, disk=3 * (ROW + 16), memory=0)
    check(cache, suffix, np.arange(12))
    assert (cache.hits, cache.misses) == (3, 9)


def test_half_precision_takes_half_the_room(tmp_path):
    cache, suffix = make(folder=tmp_path, dtype="bfloat16")
    check(cache, suffix, np.arange(12), rtol=0.02)
    assert cache.nbytes == 12 * ROW // 2
    [features] = cache(EXAMPLES, LABELS).computed
    assert features.dtype == jnp.float32
    cache, suffix = make(folder=tmp_path)  # another precision, so nothing is taken from there
    check(cache, suffix, np.arange(12))
    assert cache.hits == 0


def test_batches_of_other_sizes():
    cache, suffix = make()
    check(cache, suffix, np.arange(4))
    check(cache, suffix, np.arange(6))
    check(cache, suffix, np.arange(1))
    assert cache.nbytes == 6 * ROW or cache.hits == 0


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3),
        lambda x: x + jnp.arange(len(x))[:, None],
        lambda x: jnp.cumsum(x, 0),
        lambda x: x - x[:1],
        lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    ],
    ids=["statistics", "position", "sums", "the first", "dropout with one key"],
)
def test_fronts_that_depend_on_the_batch_are_refused(mix):
    def mixing(params, x, y):
        return jnp.mean((jnp.tanh(mix(x @ params["front"])) @ params["head"] - y) ** 2)

    prefix, _ = pj.split(mixing, MASK)
    cache = pj.FeatureCache(prefix, PARAMS)
    cache(np.ones_like(EXAMPLES[:1]), LABELS[:1])  # tells nothing
    with pytest.raises(ValueError, match="depends on the batch"):
        cache(EXAMPLES, LABELS)


def test_an_example_twice_in_a_batch():
    cache, suffix = make(memory=5 * ROW)
    check(cache, suffix, np.zeros(8, int))
    assert cache.nbytes == ROW
    check(cache, suffix, np.arange(4))
    check(cache, suffix, np.arange(4))
    assert cache.nbytes == 4 * ROW and cache.hits == 5


def test_callbacks_are_no_part_of_a_front():
    def fun(params, x, y):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = jax.pure_callback(lambda x: 2 * x, shape, x)
        return loss(params, x, y)

    prefix, _ = pj.split(fun, MASK)
    with pytest.raises(ValueError, match="no frozen front"):
        pj.FeatureCache(prefix, PARAMS)(EXAMPLES, LABELS)


def test_impossible_settings():
    with pytest.raises(ValueError, match="floating point dtype, not int8"):
        make(dtype="int8")
    cache, _ = make()
    with pytest.raises(ValueError, match="no examples"):
        cache(EXAMPLES[:0], LABELS[:0])


def test_nothing_to_keep():
    prefix, _ = pj.split(loss, True)
    with pytest.raises(ValueError, match="no frozen front"):
        pj.FeatureCache(prefix, PARAMS)(EXAMPLES, LABELS)


def test_no_axis_of_examples():
    def fun(params, x, y):
        return jnp.sum(jnp.tanh(x @ params["front"]).sum(0) @ params["head"]) + y

    prefix, _ = pj.split(fun, MASK)
    with pytest.raises(ValueError, match="first axis of examples"):
        pj.FeatureCache(prefix, PARAMS)(EXAMPLES, 0.0)
