"""Missing extras are named."""

import sys

import pytest

from pockjax._extras import MissingExtraError, require


def test_missing_module_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'pockjax\[text\]'"):
        require("safetensors.numpy", "text")


def test_what_the_module_itself_misses_is_not_blamed_on_the_extra(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency") as caught:
        require("broken_module", "text")
    assert not isinstance(caught.value, MissingExtraError)
