import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax._paths import flatten_with_paths
from pockjax.masks import MaskError, Part, Rule, Scheme, mask, pack, part
from pockjax.masks._train import entry_for, normalise_train
from tests.masks.strategies import arrays_with_parts

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co", "Cn"]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
metadata = st.dictionaries(words, plain, max_size=3)
ratios = st.floats(0, 1, exclude_min=True)
axes = st.integers(-4, 3) | st.sampled_from(["in", "out"])
channels = st.one_of(
    st.fixed_dictionaries({"in": ratios}, optional={"out": ratios}),
    st.fixed_dictionaries({"axis": axes, "ratio": ratios}, optional={"divisor": st.integers(1, 8)}),
    st.fixed_dictionaries({"axis": axes, "last": st.integers(1, 9)}),
    st.fixed_dictionaries({"axis": axes, "start": st.integers(), "stop": st.integers()}),
    st.fixed_dictionaries({"axis": axes, "indices": st.lists(st.integers(), min_size=1)}),
)
trains = st.one_of(
    st.sampled_from(["all", "none", "[:, :64]", "[..., [0, 3]]", "[-1, ::2]"]),
    channels,
    st.lists(channels, min_size=1, max_size=2),
)
rules = st.builds(Rule, words.map(re.escape), trains, words)
schemes = st.builds(
    Scheme,
    st.lists(rules, min_size=1, max_size=4).map(tuple),
    name=words,
    model=words,
    source=words,
    budget=metadata,
    predicted=metadata,
    notes=metadata,
)


@given(schemes)
def test_text_round_trips_exactly(scheme):
    again = Scheme.parse(str(scheme))
    assert again == scheme
    assert str(again) == str(scheme)


@given(arrays_with_parts())
def test_from_mask_is_exact(drawn):
    x, chosen, _ = drawn
    params = {"a.b": [x, np.ones(2)], "c": np.zeros(3)}
    made = mask(params, {"a.b": [chosen, False], "c": True})
    scheme = Scheme.parse(str(Scheme.from_mask(params, made, name="exact")))
    assert [rule.path for rule in scheme.rules] == [r"a\.b/0", "c"]
    for a, b in zip(
        jax.tree.leaves(pack(params, made)),
        jax.tree.leaves(pack(params, mask(params, scheme))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_from_mask_of_every_kind(params):
    made = mask(params, lambda path, leaf: "1" in path and (part[:2] if "bias" in path else True))
    again = mask(params, Scheme.from_mask(params, made))

    def entries(tree):
        return flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, Part))[0]

    assert entries(again) == entries(made)


def test_save_is_atomic_and_readable_by_others(tmp_path):
    path = tmp_path / "scheme.yaml"
    scheme = Scheme.from_rules([("a", "all")], name="first")
    scheme.save(path)
    assert Scheme.load(path) == Scheme.load(str(path)) == scheme
    assert path.read_text() == f"{scheme}\n"
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)

    class Unwritable(Scheme):
        def __str__(self):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        Unwritable((Rule("a", "all"),)).save(path)
    assert Scheme.load(path) == scheme
    assert sorted(os.listdir(tmp_path)) == ["other", "scheme.yaml"]


def test_metadata_becomes_plain_data():
    scheme = Scheme.from_rules([("a", "all")], predicted={"ms": np.float32(1.5), "runs": (1, 2)})
    assert scheme.predicted == {"ms": 1.5, "runs": [1, 2]}
    assert Scheme.parse(str(scheme)) == scheme
    with pytest.raises(MaskError, match=r"notes\.x must be plain data"):
        Scheme.from_rules([("a", "all")], notes={"x": object()})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rules: [", "not valid YAML"),
        ("rules: [{path: a, train: [:, 0]}]", "not valid YAML (indices must be quoted"),
        ("- a", "must be a mapping, got list"),
        ("name: x", "rules must be a list"),
        ("rules: []", "at least one rule"),
        ("nmae: x\nrules: []", "unknown key 'nmae' (did you mean name?); allowed are rules, name"),
        ("name: 3\nrules: [{path: a, train: all}]", "name must be text, got 3"),
        ("notes: 3\nrules: [{path: a, train: all}]", "notes must be a mapping, got 3"),
        ("rules: [{path: a, train: all}, 3]", "rule 2: a rule needs path and train, got 3"),
        ("rules: [{path: a}]", "rule 1: a rule needs path and train"),
        ("rules: [{path: a, trian: all}]", "rule 1: unknown key 'trian' (did you mean train?)"),
        ("rules: [{path: 3, train: all}]", "rule 1: path and note must be text"),
        ("rules: [{path: '(', train: all}]", "rule 1: '(' is not a regular expression"),
        ("rules: [{path: a, train: some}]", "rule 1: cannot read 'some': allowed are all, none"),
        ("rules: [{path: a, train: '[f(1)]'}]", "rule 1: cannot read '[f(1)]'"),
        ("rules: [{path: a, train: '[0][1]'}]", "rule 1: cannot read '[0][1]'"),
        ("rules: [{path: a, train: '[1:2.5]'}]", "slice bounds must be integers"),
        ("rules: [{path: a, train: [0, 3]}]", "[0, 3]: an index must be quoted"),
        ("rules: [{path: a, train: 0.5}]", "cannot train 0.5: allowed are"),
        ("rules: [{path: a, train: {in: 0}}]", "ratio must be above 0 and at most 1, got 0"),
        ("rules: [{path: a, train: {in: 1.5}}]", "ratio must be above 0 and at most 1, got 1.5"),
        ("rules: [{path: a, train: {in: 1/4}}]", "got '1/4'"),
        ("rules: [{path: a, train: {}}]", "axis must be an integer, 'in' or 'out'"),
        ("rules: [{path: a, train: {axis: x, first: 1}}]", "axis must be an integer"),
        ("rules: [{path: a, train: {axis: 0}}]", "must have exactly one of ratio"),
        ("rules: [{path: a, train: {axis: 0, first: 1, last: 1}}]", "exactly one of ratio"),
        ("rules: [{path: a, train: {axis: 0, first: 0}}]", "first must be a positive integer"),
        ("rules: [{path: a, train: {axis: 0, indices: []}}]", "indices must be a list of integers"),
        ("rules: [{path: a, train: {axis: 0, start: x}}]", "start and stop must be integers"),
        ("rules: [{path: a, train: {axis: 0, first: 2, divisor: 2}}]", "divisor must be a"),
        ("rules: [{path: a, train: {axis: 0, ratios: 1}}]", "unknown key 'ratios'"),
    ],
)
def test_bad_files_name_the_file_the_rule_and_what_is_allowed(tmp_path, text, problem):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(MaskError, match=re.escape(f"{path}: ") + ".*" + re.escape(problem)):
        Scheme.load(path)


def test_other_bad_rules():
    with pytest.raises(MaskError, match="rule 2: a rule needs path and train"):
        Scheme.from_rules([("a", "all"), ("a",)])
    with pytest.raises(MaskError, match="traced indices, which a scheme cannot hold"):
        Rule("a", part[jnp.array([0])])


@pytest.mark.parametrize(
    ("train", "shape", "entry"),
    [
        (True, (4,), True),
        (False, (4,), False),
        ("none", (4,), False),
        ("[ :,0:2 ]", (4, 4), part[:, 0:2]),
        (part[[3, 1]], (4,), part[[3, 1]]),
        (part[np.array([True, False])], (2,), part[[True, False]]),
        ("[...]", (4, 4), part[...]),
        ({"in": 0.25}, (3, 3, 16, 8), part[:, :, :4]),
        ({"out": 0.25}, (8,), part[:2]),
        ({"in": 0.5, "out": 0.5}, (4, 8), part[:2, :4]),
        ({"axis": "in", "ratio": 0.01}, (16, 8), part[:1]),
        ({"axis": 1, "ratio": 0.4, "divisor": 8}, (2, 32), part[:, :16]),
        ({"axis": 1, "ratio": 0.1, "divisor": 8}, (2, 32), part[:, :8]),
        ({"axis": 1, "ratio": 1, "divisor": 8}, (2, 30), part[:, :30]),
        ({"axis": 0, "first": 3}, (4, 4), part[:3]),
        ({"axis": -1, "last": 3}, (4, 4), part[:, 1:4]),
        ({"axis": 0, "start": 1, "stop": -1}, (4,), part[1:-1]),
        ({"axis": 0, "start": 2}, (4,), part[2:]),
        ({"axis": 0, "indices": np.array([3, 0])}, (4,), part[[3, 0]]),
        ([{"axis": 0, "last": 1}, {"out": 0.5}], (4, 4), part[3:4, :2]),
    ],
)
def test_what_a_rule_trains(train, shape, entry):
    assert entry_for(normalise_train(train), shape) == entry


def test_first_match_wins():
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": jnp.ones(2)}
    made = mask(params, [("a/bias", "none"), ("a/.*", {"out": 0.5})])
    assert made == {"a": {"kernel": part[:, :1], "bias": False}, "b": False}
