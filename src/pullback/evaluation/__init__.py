"""Judge methods on data where it is known what there is to find.

Data, each a sequence of `Example`:

    mosaics          four photographs in one image, the grid pointing game; `photographs`, `tiles`
    digits           handwritten digits in noise, with a network trained on the spot: the ink is the truth
    voc, coco        the data of the pointing game, from local folders
    masked_folder    photographs in class folders, with masks in a parallel folder

`run` judges methods, each an `Entry`, on examples by metrics. It can be interrupted: the next run into the same folder
goes on. It gives a tidy table; `summarise` averages it with intervals, `markdown` and `figure` show it, `write_table`
writes it as CSV or Parquet. `entries` lists every public method at a budget that a small machine can pay.

`quantus_explain` makes a method one that Quantus can call.

    python -m pullback.evaluation all --out out/evaluation
    python -m pullback.evaluation --help

Optional packages are imported where they are needed: ``pip install 'pullback[judge]'``.
"""

from pullback.evaluation.annotations import coco as coco
from pullback.evaluation.annotations import fitted as fitted
from pullback.evaluation.annotations import voc as voc
from pullback.evaluation.examples import Example as Example
from pullback.evaluation.examples import Photograph as Photograph
from pullback.evaluation.examples import digits as digits
from pullback.evaluation.examples import masked_folder as masked_folder
from pullback.evaluation.examples import mosaics as mosaics
from pullback.evaluation.examples import photographs as photographs
from pullback.evaluation.examples import single as single
from pullback.evaluation.examples import tiles as tiles
from pullback.evaluation.methods import Places as Places
from pullback.evaluation.methods import entries as entries
from pullback.evaluation.methods import within_budget as within_budget
from pullback.evaluation.quantus import quantus_explain as quantus_explain
from pullback.evaluation.runner import Entry as Entry
from pullback.evaluation.runner import run as run
from pullback.evaluation.runner import write_table as write_table
from pullback.evaluation.summary import Summary as Summary
from pullback.evaluation.summary import figure as figure
from pullback.evaluation.summary import markdown as markdown
from pullback.evaluation.summary import summarise as summarise

__all__ = [
    "Example",
    "photographs",
    "Photograph",
    "tiles",
    "mosaics",
    "single",
    "digits",
    "voc",
    "coco",
    "fitted",
    "masked_folder",
    "Entry",
    "Places",
    "entries",
    "within_budget",
    "run",
    "write_table",
    "Summary",
    "summarise",
    "markdown",
    "figure",
    "quantus_explain",
]
