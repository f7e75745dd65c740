"""What a mask costs: counted from the jaxpr, then checked against the executable."""

from pockjax.costs._flops import count_flops as count_flops
from pockjax.costs._flops import flops_of as flops_of
from pockjax.costs._latency import Rates as Rates
from pockjax.costs._latency import work_of as work_of
from pockjax.costs._memory import CompiledCost as CompiledCost
from pockjax.costs._memory import best_order as best_order
from pockjax.costs._memory import predict_temp_bytes as predict_temp_bytes
from pockjax.costs._memory import tree_bytes as tree_bytes
from pockjax.costs._prediction import Prediction as Prediction
from pockjax.costs._prediction import Separable as Separable
from pockjax.costs._reach import reached_params as reached_params
