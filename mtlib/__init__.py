"""mtlib: meta-learning and transfer learning, side by side.

The rooms, in the order to read them:

- `core`: what a task, a learner and a network are.
- `learners`: what happens inside a task, one function for each method.
- `objective`: a number to minimise over the tasks, and its gradient.
- `bilevel`: pillar I, meta-learning; `joint`: pillar II, transfer learning.
- `transfer`: pillar II in depth, from aligning domains to choosing a source.
- `tasks`: data in, streams of tasks out; `data`: the data, one file per set, and `own` for yours.
- `nets`: small networks; `norm`: an exact batch norm; `models`: networks made elsewhere.
- `train`: one loop for both pillars; `metrics`: of classes; `evaluate`: scores; `plots`: figures.
- `run`: how it runs (fast paths, threads, processes, draws ahead, checkpoints).
- `book`: what the pages of the book need.

Nothing is re-exported: write `from mtlib.bilevel import bilevel`.
"""

import mtlib.run.copies
import mtlib.run.fast  # noqa: F401 - both fill the two slots of `core`, however the package is entered

__version__ = "0.1.0"
