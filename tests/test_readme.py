"""What the README shows works as shown."""

import re
from pathlib import Path
from typing import Any

import pytest

import pockjax as pj

_ROOT = Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", _TEXT, flags=re.DOTALL | re.MULTILINE)


def test_quick_start(capsys):
    program, search = _blocks("python")
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    loss = float(capsys.readouterr().out.split()[0])
    assert loss < 0.5
    exec(compile(search, "README.md", "exec"), names)
    compiled = names["scheme"].notes["compiled"]
    assert 0 < compiled["optimizer"] <= 1024


def test_scheme_example():
    [text] = _blocks("yaml")
    assert [rule.train for rule in pj.Scheme.parse(text).rules] == ["all", {"in": 0.5}, "all"]


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!https?:)[^)]+)\)", _TEXT))
def test_links_lead_somewhere(target):
    assert (_ROOT / target).exists()


def test_commands_are_targets():
    targets = set(re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        name for block in _blocks("sh") for name in re.findall(r"^make ([a-z-]+)", block, re.M)
    }
    assert shown and shown <= targets
