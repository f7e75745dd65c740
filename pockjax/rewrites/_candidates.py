"""Which forms a convolution can take, the likeliest to be the fastest first."""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType

from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._depthwise import multiply_adds, row_blocks
from pockjax.rewrites._phases import phases
from pockjax.rewrites._products import columns, dots, gradient_dots, undilated_dots
from pockjax.rewrites._windows import Form
from pockjax.rewrites._winograd import winograd

ORIGINAL = "convolution"
"""The name of the form that was asked for."""

LOOPS = ("multiply-adds", "phases of multiply-adds")
"""Forms that are elementwise loops, which XLA makes part of whatever reads their results."""


@lru_cache(maxsize=4096)
def candidates(conv: Convolution) -> Mapping[str, Form]:
    """The forms by name, that which was asked for among them; the first is a guess without timing.

    The guesses are those of a CPU, where XLA computes depthwise and grouped convolutions and the
    gradient of a 1x1 kernel many times slower than the machine can.
    """
    found: dict[str, Form | None] = {}
    if conv.is_depthwise:
        found["multiply-adds"] = multiply_adds(conv)
        found["phases of multiply-adds"] = phases(conv, multiply_adds)
    elif conv.is_depthwise_gradient:
        found["row blocks"] = row_blocks(conv)
    elif conv.feature_groups > 1:
        found["products of groups"] = dots(conv)
        found["phases of products"] = phases(conv, dots)
    elif conv.batch_groups == 1 and prod(conv.window) == 1:
        found["product"] = dots(conv) or undilated_dots(conv)
    elif conv.batch_groups == 1 and prod(conv.out_pixels) == 1:
        found["product"] = gradient_dots(conv)
    else:
        found[ORIGINAL] = conv.apply
        found["columns"] = columns(conv)
        found["products of taps"] = dots(conv)
        found["products of positions"] = gradient_dots(conv)
        found["Winograd"] = winograd(conv, together=False)
        found["Winograd, one product"] = winograd(conv, together=True)
        found["phases"] = phases(conv, lambda part: part.apply)
        found["phases of products"] = phases(conv, dots)
    found.setdefault(ORIGINAL, conv.apply)
    return MappingProxyType({name: form for name, form in found.items() if form is not None})
