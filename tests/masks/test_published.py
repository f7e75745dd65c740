"""The published schemes, on the shapes of the networks they were published for.

For MCUNetV3's there is an independent check: its authors name them after what their
memory model gives, so that model, applied to our masks, has to give those names.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pockjax.masks import Description, Scheme, describe, mask

SCHEMES = Path(__file__).parents[2] / "configs" / "schemes"

# Per block: expanded channels / kernel size / stride / output channels.
MOBILE_NETS = {
    "mcunet": "16/3/1/8 32/3/2/16 48/3/1/16 48/7/2/24 120/3/1/24 120/3/2/40 160/7/1/40 "
    "160/5/1/48 144/3/1/48 192/3/1/48 240/7/2/96 384/5/1/96 384/5/1/96 576/3/1/160",
    "mbv2_w035": "16/3/1/8 48/3/2/8 48/3/1/8 48/3/2/16 96/3/1/16 96/3/1/16 96/3/2/24 144/3/1/24 "
    "144/3/1/24 144/3/1/24 144/3/1/32 192/3/1/32 192/3/1/32 192/3/2/56 336/3/1/56 336/3/1/56 "
    "336/3/1/112",
    "proxyless_w03": "16/3/1/8 24/5/2/16 48/3/1/16 48/7/2/16 48/3/1/16 48/5/1/16 48/5/1/16 "
    "96/7/2/24 72/5/1/24 72/5/1/24 72/5/1/24 144/5/1/32 96/5/1/32 96/5/1/32 96/5/1/32 "
    "192/7/2/64 384/7/1/64 192/7/1/64 192/7/1/64 384/7/1/96",
}


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(n: int, m: int) -> dict:
    return {"kernel": array(n, m), "bias": array(m)}


def norm(n: int) -> dict:
    return {"scale": array(n), "bias": array(n)}


def conv_norm(size: int, n: int, m: int, folded: bool) -> dict:
    kernel = {"kernel": array(size, size, n, m)}
    return {"conv": kernel | {"bias": array(m)}} if folded else {"conv": kernel, "norm": norm(m)}


def mobile_net(blocks: str, classes: int, folded: bool) -> tuple[dict, dict]:
    """A network's parameters, and for each conv its input and output width in pixels."""
    params: dict = {"stem": conv_norm(3, 3, 16, folded), "blocks": []}
    widths = {"stem": (128, 64)}
    channels, width = 16, 64
    for k, block in enumerate(blocks.split()):
        expanded, size, stride, out = map(int, block.split("/"))
        convs = {
            "depthwise": conv_norm(size, 1, expanded, folded),
            "project": conv_norm(1, expanded, out, folded),
        }
        if k > 0:
            convs["expand"] = conv_norm(1, channels, expanded, folded)
            widths[f"blocks/{k}/expand"] = (width, width)
        widths[f"blocks/{k}/depthwise"] = (width, width // stride)
        width //= stride
        widths[f"blocks/{k}/project"] = (width, width)
        params["blocks"].append(convs)
        channels = out
    params["classifier"] = dense(channels, classes)
    return params, widths


def authors_memory(rows: Description, widths: dict) -> float:
    """Extra memory of int8 training in KiB, as the authors' code counts it.

    A trained bias costs its 32-bit gradient and a 1-bit mask of its activation; a
    trained weight its 8-bit gradient and the selected channels of its 8-bit input.
    """
    bits = 0
    for row in rows:
        layer, _, name = row.path.rpartition("/")
        if layer == "classifier":
            bits += 8 * row.shape[0] if name == "kernel" else 0
        elif row.trained_shape:
            before, after = widths[layer.removesuffix("/conv")]
            if name == "bias":
                bits += 32 * row.trained + after**2 * row.trained
            else:
                depthwise = row.shape[2] == 1
                bits += 8 * (row.trained + before**2 * row.trained_shape[3 if depthwise else 2])
    return bits / 8 / 1024


def encoder(layers: int, pooler: bool) -> dict:
    width, ffn = 8, 32
    layer = {
        "attention": {name: dense(width, width) for name in ("query", "key", "value", "output")}
        | {"norm": norm(width)},
        "ffn": {"up": dense(width, ffn), "down": dense(ffn, width), "norm": norm(width)},
    }
    embeddings = {name: {"embedding": array(9, width)} for name in ("word", "position")}
    return {
        "embeddings": embeddings | {"norm": norm(width)},
        "layers": [layer] * layers,
        "classifier": dense(width, 2),
    } | ({"pooler": dense(width, width)} if pooler else {})


def llama() -> dict:
    layer = {
        "attention": {
            name: {"kernel": array(8, 8)} for name in ("query", "key", "value", "output")
        },
        "attention_norm": {"scale": array(8)},
        "ffn": {name: {"kernel": array(8, 8)} for name in ("gate", "up", "down")},
        "ffn_norm": {"scale": array(8)},
    }
    return {
        "embed": {"embedding": array(9, 8)},
        "layers": [layer] * 32,
        "norm": {"scale": array(8)},
        "head": {"kernel": array(8, 9)},
    }


def resnet50() -> dict:
    def block(first: bool) -> dict:
        names = ["conv1", "conv2", "conv3"] + ["downsample"] * first
        return {name: conv_norm(1, 4, 4, folded=False) for name in names}

    return {
        "stem": conv_norm(7, 3, 4, folded=False),
        "stages": [[block(b == 0) for b in range(count)] for count in (3, 4, 6, 3)],
        "classifier": dense(4, 10),
    }


@pytest.mark.parametrize("path", sorted(SCHEMES.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_are_in_normal_form_and_say_where_they_are_from(path):
    scheme = Scheme.load(path)
    assert path.read_text() == f"{scheme}\n"
    assert scheme.name == path.stem.replace("_", "-")
    assert scheme.model and scheme.source
    assert scheme.notes["provenance"].startswith(("exact", "recalled", "adapted"))


@pytest.mark.parametrize("path", sorted(SCHEMES.glob("*_*kb.yaml")), ids=lambda path: path.stem)
def test_mcunetv3_schemes_take_the_memory_they_are_named_after(path):
    network, budget = path.stem.removesuffix("kb").rsplit("_", 1)
    params, widths = mobile_net(MOBILE_NETS[network], classes=10, folded=True)
    rows = describe(params, mask(params, Scheme.load(path)))
    assert math.floor(authors_memory(rows, widths)) == int(budget)
    assert Scheme.load(path).budget == {"memory": f"{budget}KiB"}

    # The same units are trained where batch norms have not been folded yet.
    params, _ = mobile_net(MOBILE_NETS[network], classes=10, folded=False)
    assert describe(params, mask(params, Scheme.load(path))).trained == rows.trained


def test_mobilenet_v2():
    params, _ = mobile_net(MOBILE_NETS["mbv2_w035"], classes=10, folded=False)
    params["head"] = conv_norm(1, 112, 64, folded=False)
    rows = describe(params, mask(params, SCHEMES / "mobilenet_v2.yaml"))
    trained = {row.path for row in rows if row.trained}
    assert sum(path.endswith("norm/bias") for path in trained) == 6 * 3 + 1
    assert sum(path.endswith("expand/conv/kernel") for path in trained) == 6
    assert "head/conv/kernel" in trained and "blocks/10/expand/conv/kernel" not in trained


@pytest.mark.parametrize(
    ("scheme", "params", "kernels", "biases", "scales"),
    [
        ("bert", encoder(12, pooler=True), 4 * 5 + 2, 6 * 8 + 2, 0),
        ("bert", encoder(12, pooler=False), 4 * 5 + 1, 6 * 8 + 1, 0),
        ("distilbert", encoder(6, pooler=False), 2 * 5 + 1, 3 * 8 + 1, 0),
        ("minilm", encoder(6, pooler=False), 2 * 5 + 1, 3 * 8 + 1, 3 * 2),
        ("llama2_7b", llama(), 5 * 5, 0, 5 * 2),
        ("resnet50", resnet50(), 8 + 1, 8 * 3 + 1 + 1, 0),
    ],
)
def test_transformers_and_resnet(scheme, params, kernels, biases, scales):
    rows = describe(params, mask(params, SCHEMES / f"{scheme}.yaml"))
    trained = [row.path for row in rows if row.trained]
    counts = [sum(path.endswith(kind) for path in trained) for kind in ("kernel", "bias", "scale")]
    assert counts == [kernels, biases, scales]
    assert len(trained) == sum(counts)
