"""The exposing rules, one idea a module; importing this package registers them."""

from pockjax.autodiff.rules import control as control
from pockjax.autodiff.rules import convolution as convolution
from pockjax.autodiff.rules import elementwise as elementwise
from pockjax.autodiff.rules import gather as gather
from pockjax.autodiff.rules import products as products
from pockjax.autodiff.rules import scan as scan
from pockjax.autodiff.rules import views as views
