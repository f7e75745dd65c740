"""Which parameters to train: units, what each is worth, and the best of them under a budget."""

from pockjax.selection._budget import Budget as Budget
from pockjax.selection._budget import BudgetError as BudgetError
from pockjax.selection._budget import Limit as Limit
from pockjax.selection._channels import choose_channels as choose_channels
from pockjax.selection._found import Attempt as Attempt
from pockjax.selection._found import Found as Found
from pockjax.selection._found import Point as Point
from pockjax.selection._measure import sensitivity as sensitivity
from pockjax.selection._search import Search as Search
from pockjax.selection._search import search as search
from pockjax.selection._sensitivity import Sensitivity as Sensitivity
from pockjax.selection._units import Unit as Unit
from pockjax.selection._units import left_out as left_out
from pockjax.selection._units import union as union
from pockjax.selection._units import units as units
