import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pockjax._paths import flatten_with_paths, path_string
from tests.masks.conftest import KINDS

DENSE = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]
EXPECTED = {
    "linen": [
        "params/layers_0/bias",
        "params/layers_0/kernel",
        "params/layers_1/bias",
        "params/layers_1/kernel",
    ],
    "nnx": ["dropout/rngs/count", "dropout/rngs/key", *DENSE],
    "equinox": [
        "layers/0/weight",
        "layers/0/bias",
        "layers/1/weight",
        "layers/1/bias",
        "activation",
        "final_activation",
    ],
    "plain": [
        "layers/0/kernel",
        "layers/0/bias",
        "layers/1/kernel",
        "layers/1/bias",
        "steps/0",
        "steps/1",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_paths_of_every_kind(kind):
    tree = KINDS[kind]()
    named, treedef = flatten_with_paths(tree)
    assert [path for path, _ in named] == EXPECTED[kind]
    assert treedef == jax.tree.structure(tree)
    assert [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)] == EXPECTED[kind]


def test_only_a_variable_hides_its_value():
    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Box:
        value: Any

    tree = {"attention": Attention(jnp.ones(1), jnp.ones(1)), "box": Box(1.0)}
    named, _ = flatten_with_paths(tree)
    assert [path for path, _ in named] == ["attention/query", "attention/value", "box/value"]


def test_modules_variables_of_pytrees_and_partitioned_leaves():
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Param({"a": jnp.ones(1)})

    assert [path for path, _ in flatten_with_paths(Model())[0]] == ["table/a"]
    boxed = {"kernel": nn.Partitioned(jnp.ones((2, 2)), names=("in", "out"))}
    assert [path for path, _ in flatten_with_paths(boxed)[0]] == ["kernel"]


def test_a_single_array_has_the_empty_path():
    assert flatten_with_paths(1.0)[0] == [("", 1.0)]
    assert flatten_with_paths({"a": {"b": 1}}, is_leaf=lambda x: x == {"b": 1})[0] == [
        ("a", {"b": 1})
    ]
