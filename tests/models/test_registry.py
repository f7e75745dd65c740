"""Models by name: where their weights are looked for, and what is said if they are not there."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pockjax import hub, models
from pockjax.models import _registry
from pockjax.models.resnet import RESNET_20, published_names
from tests.models.made import made

_SIZES = {  # numbers of parameters, as published
    "mobilenet_v2": 3_504_872,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
    "resnet20": 269_722,
    "resnet56": 853_018,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
}


@pytest.mark.parametrize("name", _SIZES)
def test_sizes(name):
    model = nnx.eval_shape(lambda: models.load(name, weights=None))
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(variable.shape)) for _, variable in parameters) == _SIZES[name]


@pytest.mark.parametrize("name", [n for n in models.names() if not n.endswith("-int8")])
def test_every_model_takes_its_inputs(name):
    entry = models.entry(name)
    inputs = [np.zeros((2, *x.shape), x.dtype) for x in entry.inputs]
    logits = nnx.eval_shape(lambda *x: models.load(name, weights=None)(*x), *inputs)  # type: ignore[operator]
    assert logits.shape[0] == 2
    if entry.preprocess is not None:
        assert entry.inputs[0].shape == (entry.preprocess.crop, entry.preprocess.crop, 3)


def test_sources_exist():
    named = {models.entry(name).source for name in models.names()} - {None}
    assert named <= set(hub.sources())
    assert models.entry("mobilenet_v2").license == "MIT"
    assert models.entry("resnet20").license is None


def test_unknown_name_has_the_nearest():
    with pytest.raises(
        ValueError, match="no model is named 'mobilenetv2'; there are: mobilenet_v2"
    ):
        models.load("mobilenetv2")


def test_a_name_is_registered_once():
    entry = models.entry("resnet20")
    with pytest.raises(ValueError, match="'resnet20' is registered already"):
        models.register("resnet20", about="", inputs=entry.inputs)(entry.build)
    assert models.entry("resnet20") is entry


def test_nothing_to_download_says_where_weights_are():
    with pytest.raises(
        ValueError, match="resnet20 has no pretrained weights .* https://github.com"
    ):
        models.load("resnet20")


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth' is neither a file or folder"):
        models.load("resnet20", weights=tmp_path / "nothing.pth")


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no file 'mcunet-5fps.pkl'"):
        models.load("mcunet-5fps", weights=tmp_path)


def test_seed_decides_the_classifier_alone(tmp_path):
    file = _publish_resnet20(tmp_path / "mine.safetensors")
    one, same, other = (
        models.load("resnet20", weights=file, classes=3, rngs=rngs)
        for rngs in (None, nnx.Rngs(0), nnx.Rngs(1))
    )
    kernels = [np.asarray(model.classifier.kernel[...]) for model in (one, same, other)]  # type: ignore[attr-defined]
    assert kernels[0].shape == (64, 3)
    assert (kernels[0] == kernels[1]).all() and (kernels[0] != kernels[2]).any()
    stems = [np.asarray(model.stem.conv.kernel[...]) for model in (one, other)]  # type: ignore[attr-defined]
    assert (stems[0] == stems[1]).all()


def _made_resnet20(classes: int = 10) -> models.ResNet:
    config = dataclasses.replace(RESNET_20, classes=classes)
    return made(lambda: models.ResNet(config, rngs=nnx.Rngs(0)))


@functools.cache
def _resnet20_tensors(classes: int) -> dict[str, np.ndarray]:
    model = _made_resnet20(classes)
    names = published_names(RESNET_20)
    return {
        names["/".join(map(str, path))]: np.ascontiguousarray(
            np.asarray(variable[...]).transpose(3, 2, 0, 1)
            if variable.ndim == 4
            else np.asarray(variable[...]).T
        )
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def _publish_resnet20(file: Path, classes: int = 10) -> Path:
    """Random weights in a file with the published names."""
    save_file(_resnet20_tensors(classes), file)
    return file


@nnx.jit
def _logits(model, x):
    return model(x)


def test_weights_of_ones_own(tmp_path):
    file = _publish_resnet20(tmp_path / "mine.safetensors")
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    loaded, made = models.load("resnet20", weights=file), _made_resnet20()
    np.testing.assert_array_equal(_logits(loaded, x), _logits(made, x))


def test_weights_of_another_model(tmp_path):
    file = _publish_resnet20(tmp_path / "mine.safetensors")
    with pytest.raises(
        ValueError, match=r"mine.safetensors has no array 'layer1\.3\.conv1\.weight'"
    ):
        models.load("resnet56", weights=file)


def test_weights_with_other_classes(tmp_path):
    file = _publish_resnet20(tmp_path / "mine.safetensors", classes=4)
    with pytest.raises(ValueError, match=r"classifier/bias has shape \(10,\) .* shape \(4,\)"):
        models.load("resnet20", weights=file)
    # A new classifier needs nothing of the old one.
    model = models.load("resnet20", weights=file, classes=10, rngs=nnx.Rngs(0))
    assert model.classifier.kernel.shape == (64, 10)  # type: ignore[attr-defined]


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """A cache of huggingface_hub's with one repository, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--example--resnet"
    for revision, commit in {"main": "a" * 40, "v2": "b" * 40}.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        _publish_resnet20(snapshot / "model.safetensors")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots"


@pytest.mark.parametrize(("suffix", "commit"), [("", "a" * 40), ("@v2", "b" * 40)])
def test_hugging_face(hugging_face, suffix, commit):
    address = f"hf://example/resnet{suffix}"
    assert models.weights_path("bert-base", address) == hugging_face / commit
    file = models.weights_path("resnet20", f"{address}/model.safetensors")
    assert file == hugging_face / commit / "model.safetensors"
    models.load("resnet20", weights=f"{address}/model.safetensors")


def test_hugging_face_without_the_repository(hugging_face):
    with pytest.raises(hub.HubError, match="hf://example/nothing could not be fetched"):
        models.weights_path("bert-base", "hf://example/nothing")


@pytest.mark.parametrize("address", ["hf://", "hf://alone", "hf:///name"])
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="not of the form hf://organisation/name"):
        models.weights_path("resnet20", address)


def test_the_source_of_a_name_is_fetched(monkeypatch, tmp_path):
    asked = []

    def fetch(source, *, progress=None):
        asked.append(source)
        return tmp_path

    monkeypatch.setattr(_registry.hub, "fetch", fetch)
    (tmp_path / "mobilenet_v2-b0353104.pth").write_bytes(b"")
    assert models.weights_path("mobilenet_v2").name == "mobilenet_v2-b0353104.pth"
    assert asked == ["mobilenet_v2"]
