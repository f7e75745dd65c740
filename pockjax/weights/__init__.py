"""Readers of weight files: a path in, named numpy arrays out; they know nothing of models.

None of a file's code is ever run.
"""

from pockjax.weights._errors import WeightsError as WeightsError
from pockjax.weights._fill import fill as fill
from pockjax.weights._fill import from_torch as from_torch
from pockjax.weights._gguf import Gguf as Gguf
from pockjax.weights._gguf import read_gguf as read_gguf
from pockjax.weights._llama2c import Llama2c as Llama2c
from pockjax.weights._llama2c import read_llama2c as read_llama2c
from pockjax.weights._safetensors import read_safetensors as read_safetensors
from pockjax.weights._torch import read_torch as read_torch
