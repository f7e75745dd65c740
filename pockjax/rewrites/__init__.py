"""Equal, faster functions: jaxpr to jaxpr, choices by measurement (`pockjax.rewrite`)."""

from pockjax.rewrites._choice import Choice as Choice
from pockjax.rewrites._choice import Timing as Timing
from pockjax.rewrites._library import DEFAULT_LIBRARY as DEFAULT_LIBRARY
from pockjax.rewrites._library import LIBRARIES as LIBRARIES
from pockjax.rewrites._library import fastest as fastest
from pockjax.rewrites._rewrite import BACKENDS as BACKENDS
from pockjax.rewrites._rewrite import Rewriter as Rewriter
from pockjax.rewrites._rewrite import rewrite as rewrite
