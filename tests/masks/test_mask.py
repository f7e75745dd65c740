import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pockjax._paths import flatten_with_paths
from pockjax.masks import Block, MaskError, Part, Rule, Scheme, mask, part, resolve
from tests.masks.conftest import equinox_params, nnx_params, plain_params


def entries(tree):
    return dict(flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, Part))[0])


def trained(tree):
    return {path: entry for path, entry in entries(tree).items() if entry is not False}


def test_every_way_to_write_a_mask_gives_the_same(params, tmp_path):
    def biases(path, leaf):
        return path.endswith("bias") and part[:2]

    made = mask(params, biases)
    rules = [(".*bias", "[:2]")]
    Scheme.from_rules(rules).save(tmp_path / "scheme.yaml")
    for scheme in (
        rules,
        [Rule(*rules[0])],
        Scheme.from_rules(rules),
        tmp_path / "scheme.yaml",
        str(tmp_path / "scheme.yaml"),
        made,
    ):
        assert entries(mask(params, scheme)) == entries(made)
    assert len(trained(made)) == 2
    assert set(trained(made).values()) == {part[:2]}
    is_part = dict(is_leaf=lambda x: isinstance(x, Part))
    assert jax.tree.structure(made, **is_part) == jax.tree.structure(params)


def test_true_trains_all_that_can_be(params):
    for scheme in (True, lambda path, leaf: True, jax.tree.map(lambda _: True, params)):
        made = mask(params, scheme)
        assert len(trained(made)) == 4
        assert all("kernel" in p or "weight" in p or "bias" in p for p in trained(made))


def test_resolve_gives_blocks(params):
    made = mask(params, lambda path, leaf: path.endswith("1/bias") or path.endswith("_1/bias"))
    resolved, treedef, paths = resolve(params, made)
    assert treedef == jax.tree.structure(params)
    assert [path for path, entry in zip(paths, resolved, strict=True) if entry is True] == list(
        trained(made)
    )
    resolved, _, _ = resolve({"a": jnp.ones(4), "b": jnp.ones(4)}, {"a": part[:2], "b": part[:4]})
    assert resolved == [Block((4,), (slice(0, 2, 1),)), True]


def test_prefixes_and_dictionaries_in_place_of_other_containers():
    made = mask(
        nnx_params(),
        {"layers": {0: False, 1: {"kernel": part[:, 1:], "bias": True}}} | {"dropout": True},
    )
    assert trained(made) == {"layers/1/bias": True, "layers/1/kernel": part[:, 1:]}
    module = equinox_params()
    made = mask(
        module,
        {"layers": [True, False], "activation": False, "final_activation": False},
    )
    assert list(trained(made)) == ["layers/0/weight", "layers/0/bias"]
    with_part = eqx.tree_at(
        lambda m: m.layers[1].weight, jax.tree.map(lambda _: False, module), part[:, 2]
    )
    assert trained(mask(module, with_part)) == {"layers/1/weight": part[:, 2]}


def test_leaves_may_be_shapes_tracers_or_numpy_arrays():
    shapes = {"w": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), "n": np.ones(3, np.int32)}
    assert mask(shapes, True) == {"w": True, "n": False}
    assert mask(shapes, [("w", {"out": 0.25})]) == {"w": part[:, :2], "n": False}
    jax.eval_shape(lambda p: mask(p, [("w", {"out": 0.25})]) and p, shapes)
    assert mask(np.ones(3), part[:2]) == part[:2]


def test_nnx_filters():
    state = nnx_params()
    assert len(trained(mask(state, nnx.Param))) == 4
    assert len(trained(mask(state, [nnx.RngCount, nnx.Param]))) == 4
    made = mask(state, nnx.All(nnx.Param, nnx.PathContains("bias")))
    assert list(trained(made)) == ["layers/0/bias", "layers/1/bias"]
    made = mask(state, nnx.All(nnx.Param, nnx.Not(nnx.PathContains(0))))
    assert list(trained(made)) == ["layers/1/bias", "layers/1/kernel"]
    with pytest.raises(MaskError, match="an nnx filter needs an nnx.State"):
        mask(plain_params(), nnx.Param)
    with pytest.raises(MaskError, match="nothing is trained"):
        mask(state, nnx.LoRAParam)


def test_lora_leaves_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.lora = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)

    made = mask(nnx.state(Model(nnx.Rngs(0))), nnx.LoRAParam)
    assert list(trained(made)) == ["lora/lora/lora_a", "lora/lora/lora_b"]


def test_traced_indices_are_kept():
    rows = jnp.array([5, 0])
    made = mask({"table": jnp.ones((8, 2))}, {"table": part[rows]})
    assert jax.tree.leaves(made)[0] is rows


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        ({"a": True}, "mask and params differ: not in the mask: 'b/0', 'b/1'"),
        ({"a": True, "b": True, "c": True}, "only in the mask: 'c'"),
        ({"a": True, "b": [True]}, "not in the mask: 'b/1'"),
        ({"a": True, "b": None}, "not in the mask: 'b/0', 'b/1'"),
        ({"a": 1.0, "b": True}, "mask entry at 'a' must be True, False or a Part, got 1.0"),
        ({"a": jnp.ones(4, bool), "b": True}, "close over the mask"),
        ({"a": part[5:], "b": True}, "part[5:] of 'a', shape (4,): axis 0: bound 5 exceeds"),
        ({"a": True, "b": part[:1]}, "part[:1] for 'b/0': the leaf is an array of dtype int32"),
        (False, "nothing is trained: none of the 3 leaves is selected"),
        ({"a": False, "b": True}, "nothing is trained"),
        (lambda path, leaf: None, "predicate must return True, False or a Part, got None for 'a'"),
        (lambda path, leaf: part[:9], "part[:9] of 'a', shape (4,): axis 0: bound 9 exceeds"),
        ([("b/1", "all")], "train all for 'b/1' (rule 1: 'b/1'): the leaf is of type str"),
        ([("b/.*", {"out": 0.5})], "(rule 1: 'b/.*'): the leaf is an array of dtype int32"),
        ([("a", "[:9]")], "part[:9] of 'a', shape (4,) (rule 1: 'a'): axis 0: bound 9 exceeds"),
        ([("a", {"in": 0.5})], "of 'a', shape (4,) (rule 1: 'a'): there is no axis in"),
        ([("a", {"axis": 0, "first": 5})], "axis 0: first 5 exceeds its size, 4"),
        ([("a", [{"out": 1}, {"axis": 0, "first": 1}])], "axis 0 is named twice"),
        ("all", "'all' is what a rule may train, not a scheme: write True"),
        ([], "there are no rules"),
        (("a", "all"), "rules must be a list, even if there is one: [('a', 'all')]"),
        (Rule("a", "all"), "rules must be a list, even if there is one: [Rule("),
        ([("x/a", "all")], "rule 1: 'x/a' matches no parameter; the nearest are 'a'"),
        (
            [("a", "all"), (".*", "none"), ("a|b/0", "all")],
            "rule 3: 'a|b/0' is never reached: all that it matches is matched before, by rule 1, 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(scheme, problem):
    params = {"a": jnp.ones(4), "b": [jnp.array([3]), "text"]}
    with pytest.raises(MaskError, match=re.escape(problem)):
        mask(params, scheme)


def test_patterns_may_sweep_over_leaves_without_gradients():
    params = {"a": jnp.ones(4), "b": [jnp.array([3]), "text"]}
    assert mask(params, [(".*", "all")]) == {"a": True, "b": [False, False]}
    assert mask(params, [("b/1", "none"), (".*", "all")])["a"] is True


def test_a_callable_module_is_a_mask_and_not_a_predicate():
    module = equinox_params()
    assert callable(module)
    assert len(trained(mask(module, jax.tree.map(lambda _: True, module)))) == 4


def test_missing_scheme_file():
    with pytest.raises(FileNotFoundError):
        mask(plain_params(), Path("no/such/scheme.yaml"))
