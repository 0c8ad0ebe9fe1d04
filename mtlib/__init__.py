"""mtlib: meta-learning and transfer learning, side by side.

Read the rooms in this order: `core` (what a task, a learner and a network are), `learners` (what
happens inside a task), `bilevel` and `joint` (the two objectives), `train` (one loop for both),
`evaluate`. `tasks` and `data` make the streams; `nets` the networks; `plots` the figures.

Nothing is re-exported: write `from mtlib.bilevel import bilevel`.
"""

__version__ = "0.1.0"
