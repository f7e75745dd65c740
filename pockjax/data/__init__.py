"""Loaders that give arrays of fixed shape; they know nothing of models."""

from pockjax.data._loader import Dataset as Dataset
from pockjax.data._loader import Loader as Loader
from pockjax.data._loader import evaluation_batches as evaluation_batches
from pockjax.data._loader import split as split
from pockjax.data._loader import training_batches as training_batches
from pockjax.data.images import Augmentation as Augmentation
from pockjax.data.images import ImageFolder as ImageFolder
from pockjax.data.images import Images as Images
from pockjax.data.images import read_images as read_images
from pockjax.data.language import Continuations as Continuations
from pockjax.data.language import Instruction as Instruction
from pockjax.data.language import Sequences as Sequences
from pockjax.data.language import encode_instructions as encode_instructions
from pockjax.data.language import read_instructions as read_instructions
from pockjax.data.language import read_texts as read_texts
from pockjax.data.language import windows as windows
from pockjax.data.tables import read_table as read_table
from pockjax.data.text import Corpus as Corpus
from pockjax.data.text import Encoded as Encoded
from pockjax.data.text import encode as encode
from pockjax.data.text import read_folders as read_folders
from pockjax.data.tokenizer import load_tokenizer as load_tokenizer
