"""Criteria for what training a unit is worth, by name; a new one is one function here."""

from pockjax.selection.criteria._finetune import finetune as finetune
from pockjax.selection.criteria._gradients import fisher as fisher
from pockjax.selection.criteria._gradients import gradnorm as gradnorm
from pockjax.selection.criteria._gradients import snr as snr
from pockjax.selection.criteria._gradients import taylor as taylor
from pockjax.selection.criteria._plain import magnitude as magnitude
from pockjax.selection.criteria._plain import random as random
from pockjax.selection.criteria._registry import criterion as criterion
from pockjax.selection.criteria._registry import criterion_named as criterion_named
from pockjax.selection.criteria._registry import elements_named as elements_named
from pockjax.selection.criteria._registry import names as names
from pockjax.selection.criteria._registry import per_element as per_element
