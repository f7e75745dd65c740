import jax
import jax.numpy as jnp

from pockjax.masks import Row, describe, mask, part


def test_rows_and_table():
    params = {"a": jnp.ones((4, 8)), "b": [jnp.array(3), "text", jnp.ones(8)], "c": jnp.ones(())}
    made = mask(params, {"a": part[:, [7, 0]], "b": [False, False, True], "c": True})
    description = describe(params, made)
    assert list(description) == [
        Row("a", (4, 8), (4, 2)),
        Row("b/0", (), None),
        Row("b/2", (8,), (8,)),
        Row("c", (), ()),
    ]
    assert [row.trained for row in description] == [8, 0, 8, 1]
    assert (description.trained, description.size) == (17, 42)
    assert str(description).splitlines() == [
        "path   shape   trained  elements",
        "a      4x8     4x2             8",
        "b/0    scalar  -               0",
        "b/2    8       8               8",
        "c      scalar  scalar          1",
        "total  42      40.5%          17",
    ]


def test_every_kind(params):
    description = describe(params, mask(params, True))
    assert sum(row.trained > 0 for row in description) == 4
    assert description.trained == 4 * 6 + 6 + 6 * 3 + 3


def test_shapes_are_enough():
    shapes = {"a": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    assert describe(shapes, {"a": part[:2]}).trained == 16
    assert "-" in str(describe({}, {}))
