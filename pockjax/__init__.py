"""Sparse backpropagation for JAX: train the part of a model that matters, compute only that.

A function and a mask go in; a gradient, or a compiled training step, that computes, stores and
updates only what the mask names comes out.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from pockjax._allocator import keep_memory as keep_memory
from pockjax.adapters import AdaptedFunction as AdaptedFunction
from pockjax.adapters import AdaptedParams as AdaptedParams
from pockjax.adapters import adapt as adapt
from pockjax.autodiff import Fallback as Fallback
from pockjax.autodiff import grad as grad
from pockjax.autodiff import value_and_grad as value_and_grad
from pockjax.autodiff import vjp as vjp
from pockjax.masks import MaskError as MaskError
from pockjax.masks import Part as Part
from pockjax.masks import Rule as Rule
from pockjax.masks import Scheme as Scheme
from pockjax.masks import apply_updates as apply_updates
from pockjax.masks import describe as describe
from pockjax.masks import mask as mask
from pockjax.masks import pack as pack
from pockjax.masks import part as part
from pockjax.masks import unpack as unpack
from pockjax.prefix import FeatureCache as FeatureCache
from pockjax.prefix import Features as Features
from pockjax.prefix import split as split
from pockjax.rewrites import rewrite as rewrite
from pockjax.selection import Budget as Budget
from pockjax.selection import Sensitivity as Sensitivity
from pockjax.selection import Unit as Unit
from pockjax.selection import search as search
from pockjax.selection import sensitivity as sensitivity
from pockjax.selection import union as union
from pockjax.selection import units as units
from pockjax.training import CostModel as CostModel
from pockjax.training import Fit as Fit
from pockjax.training import Measurement as Measurement
from pockjax.training import Metrics as Metrics
from pockjax.training import Report as Report
from pockjax.training import State as State
from pockjax.training import Step as Step
from pockjax.training import compile as compile
from pockjax.training import fit as fit

try:
    __version__ = _version("pockjax")
except _PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0.0.0"
