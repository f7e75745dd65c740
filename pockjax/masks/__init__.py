"""Masks: which parts of the parameters are trained.

A mask is a pytree like the parameters, or a prefix of it, that holds True (train), False
(frozen) or a `Part` (train a block of the leaf). A `Scheme` is a mask as text. `pack` cuts
the trained parts out into a tree of their own, and `unpack` and `apply_updates` put values
and updates back.
"""

from pockjax.masks._describe import Description as Description
from pockjax.masks._describe import Row as Row
from pockjax.masks._describe import describe as describe
from pockjax.masks._mask import mask as mask
from pockjax.masks._packed import apply_updates as apply_updates
from pockjax.masks._packed import pack as pack
from pockjax.masks._packed import unpack as unpack
from pockjax.masks._part import MaskError as MaskError
from pockjax.masks._part import Part as Part
from pockjax.masks._part import part as part
from pockjax.masks._resolve import Entry as Entry
from pockjax.masks._resolve import named_entries as named_entries
from pockjax.masks._resolve import resolve as resolve
from pockjax.masks._rules import Rule as Rule
from pockjax.masks._scheme import Scheme as Scheme
from pockjax.masks._selection import Block as Block
from pockjax.masks._selection import Selection as Selection
