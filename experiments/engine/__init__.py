"""The engine behind the questions: what a question file imports is here.

question.py    Config, Condition: what a question is
learn.py       training as a condition: lanes side by side, instruments on the way, rates that are
chosen on held-out images
rates.py       the largest stable learning rate of each seed
devices.py     training over several devices as a condition
texts.py       small language models, and how they read a text
plain.py       training in plain JAX, for what the trainer has no place for
records.py     what was measured, and what verdicts and figures ask of it
verdict.py     a claim, its effect, its interval over seeds and test images, its bounds
draw.py        what the figures are made of
"""

from ..rundir import Record, number, packed
from ..training.driver import Checkpoint
from . import plain
from .learn import (
    Instrument,
    Lane,
    Net,
    Nets,
    dataset,
    held_out,
    lanes,
    learn,
    pooled,
    shuffled,
    tuned,
)
from .question import Condition, Config, Measure, Question, Schedule, exact
from .rates import largest_stable, searched
from .records import Records
from .texts import Language, first_gradients
from .verdict import Source, Verdict, decide, decide_share
