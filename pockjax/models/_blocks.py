"""Building blocks of the convolutional networks, and folding of their batch norms."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Activation = Callable[[jax.Array], jax.Array]
Padding = Literal["same", "centered"]


class FrozenBatchNorm(nnx.Module):
    """Batch norm that normalises with stored statistics, and never with those of the batch.

    `scale` and `bias` are parameters like any other. `mean` and `var` are not (`nnx.BatchStat`), so
    a step has nothing to update in them and no reduction over the batch: what fine-tuning with
    small batches needs, and what can be folded into the convolution before it.
    """

    def __init__(self, features: int, *, epsilon: float) -> None:
        """Make the norm that changes nothing but for `epsilon`.

        Args:
            features: Channels.
            epsilon: Added to the variance.
        """
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise each channel."""
        normal = (x - self.mean[...]) * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return normal * self.scale[...] + self.bias[...]


class ConvNorm(nnx.Module):
    """A convolution, its batch norm, and an activation function.

    Parameters are `conv/kernel` and `norm/{scale,bias}`; once folded `conv/{kernel,bias}` alone.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Activation | None = None,
        padding: Padding = "centered",
        norm_epsilon: float | None = 1e-5,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the layer.

        Args:
            inputs: Channels that come in.
            outputs: Channels that go out.
            size: Height and width of the kernel.
            stride: Step of the kernel, in pixels.
            groups: Into how many groups the channels are cut; `inputs` for a depthwise layer.
            activation: Applied at the end; None for nothing.
            padding: "centered" has as many zeros on each side (PyTorch's habit), "same" puts the
                odd one after the image (TensorFlow's); they differ where the stride is not 1.
            norm_epsilon: Of the batch norm; None for a convolution with a bias instead of one.
            rngs: For the kernel.
        """
        border = (size // 2, size // 2)
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding="SAME" if padding == "same" else (border, border),
            feature_group_count=groups,
            use_bias=norm_epsilon is None,
            rngs=rngs,
        )
        if norm_epsilon is not None:
            self.norm = FrozenBatchNorm(outputs, epsilon=norm_epsilon)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """Convolve, normalise, activate."""
        x = self.conv(x)
        if hasattr(self, "norm"):
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def fold(self) -> None:
        """Put the batch norm, if there is one, into the convolution's kernel and bias."""
        if not hasattr(self, "norm"):
            return
        norm, conv = self.norm, self.conv
        factor = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
        conv.kernel = nnx.Param(conv.kernel[...] * factor)
        conv.bias = nnx.Param(norm.bias[...] - norm.mean[...] * factor)
        conv.use_bias = True
        del self.norm


def fold_batch_norm[Module: nnx.Module](model: Module) -> Module:
    """A copy of a model whose batch norms are folded into their convolutions.

    With frozen statistics a batch norm is one multiplication and one addition per channel, so the
    copy computes the same function, to rounding, with fewer operations and parameters.

    Args:
        model: Any module with `ConvNorm` layers in it; it is left as it is.

    Example:
        >>> model = ConvNorm(3, 8, 3, rngs=nnx.Rngs(0))
        >>> folded = fold_batch_norm(model)
        >>> sorted("/".join(path) for path, _ in nnx.to_flat_state(nnx.state(folded)))
        ['conv/bias', 'conv/kernel']
        >>> x = jnp.ones((1, 4, 4, 3))
        >>> bool(jnp.allclose(model(x), folded(x), atol=1e-6))
        True
    """
    folded = nnx.clone(model)
    for _, module in nnx.iter_modules(folded):
        if isinstance(module, ConvNorm):
            module.fold()
    return folded


def classifier(inputs: int, classes: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A new linear classifier."""
    return nnx.Linear(inputs, classes, rngs=rngs)


def pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch channels"]:
    """The mean over all pixels."""
    return x.mean(axis=(1, 2))
