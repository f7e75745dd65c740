"""Adapters of low rank beside the weights of any function."""

from pockjax.adapters._adapt import AdaptedFunction as AdaptedFunction
from pockjax.adapters._adapt import AdaptedParams as AdaptedParams
from pockjax.adapters._adapt import adapt as adapt
