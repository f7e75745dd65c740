"""The library that computes products is chosen by measurement, once; results stay equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pockjax.rewrites import _library
from pockjax.rewrites._library import DEFAULT_LIBRARY, LIBRARIES, fastest
from pockjax.rewrites._timing import in_turn


def lowered():
    return jax.jit(lambda x: jnp.tanh(x @ x).sum(0)).lower(jnp.ones((64, 64)))


def start(executable):
    return lambda: jax.block_until_ready(executable(jnp.ones((64, 64))))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKJAX_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def timed(monkeypatch):
    """Counts measurements, with made-up results."""
    calls = []

    def measure(runs, seconds):
        calls.append(list(runs))
        return {name: 1.0 / (i + 1) for i, name in enumerate(runs)}

    monkeypatch.setattr(_library, "in_turn", measure)
    return calls


def test_all_libraries_are_timed_once(cache, timed):
    first, _ = fastest(lowered(), start)
    second, _ = fastest(lowered(), start)
    assert timed == [list(LIBRARIES)]
    assert first == second == list(LIBRARIES)[-1]


def test_the_default_stands_unless_another_is_clearly_faster(cache, monkeypatch):
    monkeypatch.setattr(
        _library, "in_turn", lambda runs, s: {n: 1.0 - 0.01 * i for i, n in enumerate(runs)}
    )
    assert fastest(lowered(), start)[0] == DEFAULT_LIBRARY


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"library": "none such"}', b'{"library": 3}']
)
def test_a_corrupted_file_is_measured_anew(cache, timed, content):
    fastest(lowered(), start)
    [file] = cache.rglob("*.json")
    file.write_bytes(content)
    fastest(lowered(), start)
    assert len(timed) == 2


def test_an_option_that_is_not_known_is_left_out(cache, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "none such", {"xla_no_such_option": True})
    name, executable = fastest(lowered(), start)
    assert name in LIBRARIES and name != "none such"
    with pytest.raises(ValueError, match="xla_no_such_option"):
        fastest(lowered(), start, {"xla_no_such_option": True})


def test_results_are_equal(cache):
    x = jax.random.normal(jax.random.key(0), (64, 64))
    want = lowered().compile()(x)
    for options in LIBRARIES.values():
        got = lowered().compile(compiler_options=options or None)(x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_programs_run_in_turn():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = in_turn(runs, 0.0)
    assert seconds.keys() == {"a", "b"} and all(0 <= s < 1 for s in seconds.values())
    assert order[:4] == list("abab")


def test_a_program_is_given_up_after_two_slow_runs_not_after_one(monkeypatch):
    took = {"steady": [2.0], "disturbed": [1000.0, 1.0], "slow": [1000.0, 900.0, 0.0]}
    clock, runs_of = [0.0], dict.fromkeys(took, 0)

    def run(name):
        turn = runs_of[name] - 1  # the first is not timed
        clock[0] += 0.0 if turn < 0 else took[name][min(turn, len(took[name]) - 1)]
        runs_of[name] += 1

    monkeypatch.setattr("pockjax.rewrites._timing.time.perf_counter", lambda: clock[0])
    runs = {name: lambda name=name: run(name) for name in took}
    assert in_turn(runs, 1e9) == {"steady": 2.0, "disturbed": 1.0, "slow": 900.0}
