"""The demo: fine-tune a text encoder by full and by sparse backpropagation, and compare.

`run` is `pockjax demo`. It fetches all-MiniLM-L6-v2 and BBC News, trains the encoder to tell the
topic of an article, twice, each time in a process of its own, and writes what it measured.
"""

from pockjax.demo._config import DemoConfig as DemoConfig
from pockjax.demo._processes import DemoError as DemoError
from pockjax.demo._run import run as run
