"""A convolution as data: what was asked of `lax.conv_general_dilated`, by its axes' names."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax import lax

from pockjax._compat import JaxprEqn, dtype_of, shape_of


@dataclass(frozen=True)
class Convolution:
    """One convolution: shapes, and which axis is what.

    The gradients of a convolution are convolutions too, of the same primitive: with respect to the
    input, one whose input is dilated by the strides; with respect to the kernel, one whose window
    is the whole cotangent.

    Attributes:
        lhs_shape: of the input.
        rhs_shape: of the kernel.
        out_shape: of the result.
        dtype: of input, kernel and result.
        lhs_spec: axes of the input: batch, feature, spatial...
        rhs_spec: axes of the kernel: output feature, input feature, spatial...
        out_spec: axes of the result: batch, feature, spatial...
        strides: of the window.
        padding: low and high, may be negative.
        lhs_dilation: one more than the zeros between pixels.
        rhs_dilation: the same for the window.
        feature_groups: groups of features that do not see each other.
        batch_groups: groups of the batch that give different output features.
        precision: of the products.
        backwards: whether the window reads the kernel from its end, as the gradient of an input
            does. `lax.conv_general_dilated` does not; `lax.rev` stands before it.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    precision: Any
    backwards: bool = False

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "Convolution | None":
        """What an equation computes; None if it is no plain convolution of real numbers."""
        if eqn.primitive.name != "conv_general_dilated":
            return None
        lhs, rhs = eqn.invars
        [out] = eqn.outvars
        dtypes = {str(dtype_of(v)) for v in (lhs, rhs, out)}
        if len(dtypes) != 1 or not dtypes <= {"float32", "float64", "bfloat16", "float16"}:
            return None
        p = eqn.params
        numbers = p["dimension_numbers"]
        found = cls(
            lhs_shape=shape_of(lhs),
            rhs_shape=shape_of(rhs),
            out_shape=shape_of(out),
            dtype=dtypes.pop(),
            lhs_spec=tuple(numbers.lhs_spec),
            rhs_spec=tuple(numbers.rhs_spec),
            out_spec=tuple(numbers.out_spec),
            strides=tuple(p["window_strides"]),
            padding=tuple((low, high) for low, high in p["padding"]),
            lhs_dilation=tuple(p["lhs_dilation"]),
            rhs_dilation=tuple(p["rhs_dilation"]),
            feature_groups=p["feature_group_count"],
            batch_groups=p["batch_group_count"],
            precision=p["precision"],
        )
        sizes = (*found.lhs_shape, *found.rhs_shape, *found.out_shape)
        return found if found.lhs_spatial and all(sizes) else None

    @property
    def lhs_spatial(self) -> tuple[int, ...]:
        """Spatial axes of the input."""
        return self.lhs_spec[2:]

    @property
    def rhs_spatial(self) -> tuple[int, ...]:
        """Spatial axes of the kernel."""
        return self.rhs_spec[2:]

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """Spatial axes of the result."""
        return self.out_spec[2:]

    @property
    def pixels(self) -> tuple[int, ...]:
        """Size of the input along each spatial axis."""
        return tuple(self.lhs_shape[a] for a in self.lhs_spatial)

    @property
    def window(self) -> tuple[int, ...]:
        """Size of the kernel along each spatial axis."""
        return tuple(self.rhs_shape[a] for a in self.rhs_spatial)

    @property
    def out_pixels(self) -> tuple[int, ...]:
        """Size of the result along each spatial axis."""
        return tuple(self.out_shape[a] for a in self.out_spatial)

    @property
    def is_grouped(self) -> bool:
        """Whether features or batch are in groups."""
        return self.feature_groups > 1 or self.batch_groups > 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each input feature has windows of its own."""
        features = self.lhs_shape[self.lhs_spec[1]]
        return self.batch_groups == 1 and 1 < self.feature_groups == features

    @property
    def is_depthwise_gradient(self) -> bool:
        """Whether this is the gradient of a depthwise kernel, one window for each feature."""
        groups = self.lhs_shape[self.lhs_spec[0]]
        outs = self.rhs_shape[self.rhs_spec[0]]
        return self.feature_groups == 1 and 1 < self.batch_groups == groups == outs

    @property
    def is_dilated(self) -> bool:
        """Whether there are zeros between the input's pixels."""
        return any(d != 1 for d in self.lhs_dilation)

    @property
    def products(self) -> int:
        """Number of multiplications, those with padding included."""
        inner = prod(self.window) * self.rhs_shape[self.rhs_spec[1]]
        return prod(self.out_shape) * inner

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the input and the kernel."""
        return (
            jax.ShapeDtypeStruct(self.lhs_shape, self.dtype),
            jax.ShapeDtypeStruct(self.rhs_shape, self.dtype),
        )

    def forwards(self, rhs: jax.Array) -> jax.Array:
        """The kernel in the order in which the window reads it."""
        return lax.rev(rhs, self.rhs_spatial) if self.backwards else rhs

    def apply(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The convolution as it was asked for."""
        return lax.conv_general_dilated(
            lhs,
            self.forwards(rhs),
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            lax.ConvDimensionNumbers(self.lhs_spec, self.rhs_spec, self.out_spec),
            self.feature_groups,
            self.batch_groups,
            self.precision,
        )
