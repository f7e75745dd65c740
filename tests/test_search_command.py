"""`pockjax search`: from a configuration and a folder of images to a scheme."""

import json

import numpy as np
import optax
import pytest
import yaml
from PIL import Image
from rich.console import Console

import pockjax as pj
from pockjax._search_command import SearchConfig, run
from pockjax._tasks import classification


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("bright", "dark"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(12):
            level = 170 if name == "bright" else 60
            pixels = generator.integers(level - 50, level + 50, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def _config(tmp_path, images, **changed):
    content = {
        "model": "resnet20", "data": str(images), "weights": None, "budget": {"memory": "60%"},
        "criterion": "magnitude", "batch": 4, "size": 32, "ratios": [1], "steps": 1, "points": 3,
        "out": str(tmp_path / "out"), **changed,
    }  # fmt: skip
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_scheme_is_written_whose_step_keeps_the_budget(tmp_path, images):
    config = SearchConfig.load(_config(tmp_path, images))
    files = {path.name: path for path in run(config, Console(quiet=True))}
    assert set(files) == {
        "scheme.yaml", "sensitivity.json", "sensitivity.png", "report.md", "pareto.json",
        "pareto.png",
    }  # fmt: skip
    scheme = pj.Scheme.load(files["scheme.yaml"])
    task = classification("resnet20", str(images), weights=None, size=32)
    [batch] = task.batches(size=4, count=1, seed=0)
    step = pj.compile(
        task.loss, pj.mask(task.params, scheme), optax.adam(1e-3), task.params, *batch,
        remat=scheme.notes.get("remat", ()),
    )  # fmt: skip
    total = step.report.compiled.total_bytes
    assert total == scheme.notes["compiled"]["memory"] <= scheme.notes["limits"]["memory"]
    assert any(rule.path.startswith("classifier") for rule in scheme.rules)
    points = json.loads(files["pareto.json"].read_text())["points"]
    assert [p["objective"] for p in points] == sorted(p["objective"] for p in points)
    assert "| memory |" in files["report.md"].read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modle": "x"}, r"unknown field 'modle' \(did you mean model\?\)"),
        ({"budget": {"memry": "3MiB"}}, r"unknown budget 'memry' \(did you mean memory\?\)"),
        ({"budget": {"memory": 0.3}}, "might be a fraction or a number of bytes"),
        ({"budget": "3MiB"}, "budget must be a mapping"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"batch": "8"}, "batch must be a whole number of at least 1, got '8'"),
        ({"ratios": 0.5}, "ratios must be a list of numbers"),
        ({"ratios": [0.5, 2]}, "ratios are above 0 and at most 1"),
        ({"seeds": 3}, "seeds must be a list of numbers"),
        ({"out": None}, "out must be a folder"),
        ({"criterion": "fischer"}, "no criterion is named 'fischer'"),
        ({"solver": "mlip"}, "no solver is named 'mlip'"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, images, changed, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig.load(_config(tmp_path, images, **changed))


def test_images_need_a_folder():
    with pytest.raises(ValueError, match="mobilenet_v2 needs data"):
        classification("mobilenet_v2")
    with pytest.raises(ValueError, match="is no classifier of images or texts"):
        classification("stories260k")
