"""The frozen front of a function: found from its jaxpr, computed once, kept (`pockjax.split`)."""

from pockjax.prefix._cache import FeatureCache as FeatureCache
from pockjax.prefix._examples import MixedExamples as MixedExamples
from pockjax.prefix._examples import UnequalPieces as UnequalPieces
from pockjax.prefix._pieces import in_pieces as in_pieces
from pockjax.prefix._split import Features as Features
from pockjax.prefix._split import Front as Front
from pockjax.prefix._split import split as split
