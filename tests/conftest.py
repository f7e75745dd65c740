"""What every test needs: host devices, hypothesis profiles, and small stand-ins for real files."""

import os

# Memory that is kept would hide from tests what they allocate; its own tests start processes.
os.environ["POCKJAX_KEEP_MEMORY"] = "0"
# Before JAX is imported: four devices, so that sharding is tested on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from safetensors.numpy import save_file

from pockjax import hub
from pockjax.models import BertConfig
from pockjax.models.bert import published_names

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _fetched(source: str) -> Path:
    try:
        return hub.fetch(source)
    except hub.HubError as error:
        pytest.skip(f"{source} cannot be fetched: {error}")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder with the published all-MiniLM-L6-v2."""
    return _fetched("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def bbc_news() -> Path:
    """Folder with the BBC News corpus."""
    return _fetched("bbc-news")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct as a GGUF file."""
    return _fetched("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the data sets and small weights that tests use if they are there."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POCKJAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set POCKJAX_DATA to the folder with test data")
    return folder


@pytest.fixture
def publish_bert(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder with small random weights, as Hugging Face publishes them."""

    def publish(vocabulary: int = 40, *, distil: bool = False, prefix: str = "") -> Path:
        folder = tmp_path / "weights"
        folder.mkdir()
        common = {"vocab_size": vocabulary, "max_position_embeddings": 32}
        if distil:
            given = {"model_type": "distilbert", "activation": "gelu", "dim": 16, "n_layers": 2}
            given |= {"n_heads": 4, "hidden_dim": 24}
        else:
            given = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 16}
            given |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
            given |= {"type_vocab_size": 2, "layer_norm_eps": 1e-12}
        (folder / "config.json").write_text(json.dumps(common | given))

        config = BertConfig.from_json(folder / "config.json", classes=2)
        generator = np.random.default_rng(0)
        tensors = {
            prefix + name: generator.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape)
            for path, name in published_names(config, ()).items()
            for shape in [_published_shape(path, config)]
        }
        save_file(
            {name: value.astype(np.float32) for name, value in tensors.items()},
            folder / "model.safetensors",
        )
        return folder

    return publish


def _published_shape(path: str, config: BertConfig) -> tuple[int, ...]:
    rows = {
        "word": config.vocabulary,
        "position": config.positions,
        "token_type": config.token_types,
    }
    *_, owner, kind = path.split("/")
    if kind == "embedding":
        return (rows[owner], config.width)
    sizes = {"up": (config.ffn_width, config.width), "down": (config.width, config.ffn_width)}
    out, into = sizes.get(owner, (config.width, config.width))
    return (out, into) if kind == "kernel" else (out,)
