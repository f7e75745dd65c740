"""The compiled training step: `compile`, its state and its report."""

from pockjax.training._cost_model import CostModel as CostModel
from pockjax.training._report import Estimate as Estimate
from pockjax.training._report import ParameterRow as ParameterRow
from pockjax.training._report import Report as Report
from pockjax.training._state import Metrics as Metrics
from pockjax.training._state import State as State
from pockjax.training._step import Step as Step
from pockjax.training._step import compile as compile
