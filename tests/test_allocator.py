"""Memory kept from step to step, in processes of their own: the setting is one of the process."""

import json
import os
import subprocess
import sys

import pytest

from pockjax import _allocator

glibc = pytest.mark.skipif(not _allocator.is_supported(), reason="needs glibc")

_STEPS = """
import json, resource, sys
import jax, jax.numpy as jnp
import pockjax as pj

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = pj.keep_memory() if "keep" in sys.argv else None
x = jnp.ones(6000)
run = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.outer(x, x)).sum()).lower(x).compile()
for _ in range(20):  # until the process has grown
    run(x).block_until_ready()
taken = []
for _ in range(8):  # the process may still grow in one of them
    before = faults()
    run(x).block_until_ready()
    taken.append(faults() - before)
temp = run.memory_analysis().temp_size_in_bytes
print(json.dumps([kept, pj.keep_memory(), temp, min(taken)]))
"""


def _printed(program: str, *arguments: str, switch: str = "") -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    out = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**inherited, "POCKJAX_KEEP_MEMORY": switch},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return out.stdout


@glibc
def test_memory_that_is_kept_costs_no_page_faults():
    kept, again, temp, faults = json.loads(_printed(_STEPS, "keep"))
    assert kept and again and temp > 100e6
    none, too_late, same_temp, plain_faults = json.loads(_printed(_STEPS))
    assert none is None and not too_late and same_temp == temp
    assert plain_faults > 10 * max(faults, 1)


def test_says_so_where_it_is_switched_off():
    assert _printed("import pockjax; print(pockjax.keep_memory())", switch="0") == "False\n"


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "confstr", lambda name: "musl 1.2")
    monkeypatch.setattr(_allocator, "_kept", False)
    assert not _allocator.is_supported() and not _allocator.set_options()


@pytest.mark.parametrize("program", ["pockjax.cli", "pockjax.demo"])
def test_programs_of_ours_can_still_keep_memory_once_imported(program: str):
    printed = _printed(f"import {program}, pockjax; print(pockjax.keep_memory())")
    assert printed == f"{_allocator.is_supported()}\n"


def test_advice_is_given_once_and_only_for_large_steps(monkeypatch, caplog):
    monkeypatch.setattr(_allocator, "_told", False)
    monkeypatch.setattr(_allocator, "_kept", False)
    monkeypatch.setattr(_allocator, "has_huge_pages", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("POCKJAX_HUGE_PAGES", raising=False)
    _allocator.advise(2**20)
    assert not caplog.records
    _allocator.advise(64 * 2**20)
    _allocator.advise(64 * 2**20)
    [record] = caplog.records
    assert "64 MiB" in record.getMessage() and _allocator.SETTING in record.getMessage()


@pytest.mark.parametrize("silent", ["kept", "switched off"])
def test_no_advice_where_it_is_followed_or_not_wanted(silent: str, monkeypatch, caplog):
    monkeypatch.setattr(_allocator, "_told", False)
    monkeypatch.setattr(_allocator, "has_huge_pages", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("POCKJAX_HUGE_PAGES", raising=False)
    monkeypatch.setattr(_allocator, "_kept", silent == "kept")
    monkeypatch.setenv("POCKJAX_HUGE_PAGES", "0" if silent == "switched off" else "1")
    _allocator.advise(64 * 2**20)
    assert not caplog.records


_SHOW = (
    "import os, sys; from pockjax._allocator import begin_again; begin_again(); "
    "print(os.environ.get('GLIBC_TUNABLES'), os.getpid(), sys.argv[1:])"
)


def _begun(**environment: str) -> list[str]:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "POCKJAX_HUGE_PAGES")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _SHOW, "a b", "-c"],
        env=inherited | environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    setting, pid, *arguments = out.split(maxsplit=2)
    assert int(pid) == process.pid and arguments == ["['a b', '-c']\n"]
    return [setting]


@pytest.mark.skipif(not _allocator.has_huge_pages(), reason="needs glibc and huge pages")
def test_begins_again_with_huge_pages_once_and_as_the_same_process():
    assert _begun() == ["glibc.malloc.hugetlb=1"]


@pytest.mark.parametrize(
    "environment",
    [{"POCKJAX_HUGE_PAGES": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}],
)
def test_does_not_begin_again_where_somebody_has_chosen(environment):
    assert _begun(**environment) == [environment.get("GLIBC_TUNABLES", "None")]
