"""The sparse transforms: expose, differentiate, fold."""

from pockjax.autodiff._exposed import Fallback as Fallback
from pockjax.autodiff._indices import IndexedMask as IndexedMask
from pockjax.autodiff._jaxprs import inlined as inlined
from pockjax.autodiff._jaxprs import size_in_bytes as size_in_bytes
from pockjax.autodiff._jaxprs import spliced as spliced
from pockjax.autodiff._residuals import Split as Split
from pockjax.autodiff._trace import Arrays as Arrays
from pockjax.autodiff._trace import Joint as Joint
from pockjax.autodiff._trace import Primal as Primal
from pockjax.autodiff._trace import differentiate as differentiate
from pockjax.autodiff._trace import is_array as is_array
from pockjax.autodiff._trace import trace as trace
from pockjax.autodiff._transform import grad as grad
from pockjax.autodiff._transform import value_and_grad as value_and_grad
from pockjax.autodiff._transform import vjp as vjp
