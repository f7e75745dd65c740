"""Forms are chosen by measurement, once; what was measured is kept on disk."""

import json
import subprocess
import sys
from math import prod

import jax.numpy as jnp
import pytest
from jax import lax, make_jaxpr

from pockjax.rewrites import _choice
from pockjax.rewrites._candidates import ORIGINAL
from pockjax.rewrites._choice import Timing, choose
from pockjax.rewrites._convolution import Convolution


def depthwise(pixels=32, channels=64) -> Convolution:
    def fun(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )  # fmt: skip

    jaxpr = make_jaxpr(fun)(jnp.ones((2, pixels, pixels, channels)), jnp.ones((3, 3, 1, channels)))
    conv = Convolution.of(jaxpr.eqns[0])
    assert conv is not None
    return conv


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKJAX_CACHE", str(tmp_path))
    _choice._timings.cache_clear()
    yield tmp_path
    _choice._timings.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, with made-up results."""
    calls = []

    def measure(conv, forms):
        calls.append(conv)
        return {name: Timing(1.0 + i, 0) for i, name in enumerate(reversed(list(forms)))}

    monkeypatch.setattr(_choice, "_measure", measure)
    return calls


def again(conv, **kwargs):
    """As another process would."""
    _choice._timings.cache_clear()
    return choose(conv, measure=True, memory=None, **kwargs)[0]


def test_forms_are_timed_once(cache, measured):
    first, second = again(depthwise()), again(depthwise())
    assert len(measured) == 1 and first == second
    assert first.form == ORIGINAL  # the fastest, as it was made up
    assert again(depthwise(channels=65)).timings and len(measured) == 2


def test_real_timings(cache):
    choice = again(depthwise())
    assert choice.timings.keys() == {"multiply-adds", ORIGINAL}
    assert all(timing.seconds > 0 for timing in choice.timings.values())
    assert choice.form == min(choice.timings, key=lambda name: choice.timings[name].seconds)
    [file] = cache.rglob("*.json")
    assert json.loads(file.read_text())["operation"] == choice.operation


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff", b"[]", b'{"timings": {"x": 1}}'])
def test_a_corrupted_file_is_measured_anew(cache, measured, content):
    again(depthwise())
    [file] = cache.rglob("*.json")
    file.write_bytes(content)
    again(depthwise())
    assert len(measured) == 2
    assert json.loads(file.read_text())["timings"]


def test_a_cache_that_cannot_be_written(cache, measured, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("POCKJAX_CACHE", str(cache / "file"))
    assert again(depthwise()).timings


def test_small_operations_are_not_timed(cache, measured):
    choice = again(depthwise(pixels=4, channels=8))
    assert not measured and choice.form == "multiply-adds" and choice.speedup is None


def test_the_guess_stands_unless_another_is_clearly_faster(cache, monkeypatch):
    for seconds, form in ((0.9, "multiply-adds"), (0.7, ORIGINAL)):
        timings = {"multiply-adds": Timing(1.0, 0), ORIGINAL: Timing(seconds, 0)}
        monkeypatch.setattr(_choice, "_measure", lambda conv, forms, timings=timings: timings)
        for file in cache.rglob("*.json"):
            file.unlink()
        assert again(depthwise()).form == form


def test_memory_limits_the_choice(cache, monkeypatch):
    timings = {"multiply-adds": Timing(1.0, 10**9), ORIGINAL: Timing(2.0, 10)}
    monkeypatch.setattr(_choice, "_measure", lambda conv, forms: timings)
    assert again(depthwise()).form == ORIGINAL
    assert choose(depthwise(), measure=True, memory=10**9)[0].form == "multiply-adds"
    assert choose(depthwise(), measure=True, memory=10**8)[0].form == ORIGINAL


@pytest.mark.parametrize(
    ("pixels", "times", "form"),
    [(16, 2.5, "multiply-adds"), (64, 3.5, "multiply-adds"), (64, 4.5, ORIGINAL)],
    ids=["copies of a small image", "a few copies of a large one", "many copies of a large one"],
)
def test_memory_that_a_form_may_take_by_default(cache, monkeypatch, pixels, times, form):
    """Of small images the padded copies alone can be larger than the arrays."""
    conv = depthwise(pixels, channels=256)
    arrays = 4 * sum(map(prod, (conv.lhs_shape, conv.rhs_shape, conv.out_shape)))
    timings = {"multiply-adds": Timing(1.0, int(times * arrays)), ORIGINAL: Timing(20.0, 0)}
    monkeypatch.setattr(_choice, "_measure", lambda conv, forms: timings)
    assert again(conv).form == form


def test_processes_share_a_cache(cache):
    program = (
        "import jax, jax.numpy as jnp, pockjax as pj\n"
        "conv = jax.lax.conv_general_dilated\n"
        "f = lambda x, w: conv(x, w, (1, 1), 'SAME', feature_group_count=64,"
        " dimension_numbers=('NHWC', 'HWIO', 'NHWC'))\n"
        "pj.rewrite(f, 'cpu')(jnp.ones((2, 32, 32, 64)), jnp.ones((3, 3, 1, 64)))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(list(cache.rglob("*.json"))) == 1
    assert not list(cache.rglob(".tmp-*"))
