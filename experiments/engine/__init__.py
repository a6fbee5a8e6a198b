"""The engine behind the questions: what a question file imports is here.

question.py    Config, Condition: what a question is
learn.py       training as a condition: lanes side by side, instruments on the way
devices.py     training over several devices as a condition
verdict.py     a claim, its effect, its interval over seeds, its threshold
kept.py        the directory of a run: records, checkpoints, the lock
sources.py     which version of the code a run is of
pool.py        one worker process for each core
ask.py         asking: keep what is finished, measure the rest, decide
"""

from .learn import Instrument, Lane, Net, dataset, lanes, learn, shuffled, start
from .question import Checkpoint, Condition, Config, Measure, Question, Record, Schedule, exact
from .verdict import (
    Verdict,
    accuracy,
    by_seed,
    decide,
    last,
    number,
    select,
    share_of_steps,
    steps_to,
    tuned,
)

__all__ = [
    "Checkpoint",
    "Condition",
    "Config",
    "Instrument",
    "Lane",
    "Measure",
    "Net",
    "Question",
    "Record",
    "Schedule",
    "Verdict",
    "accuracy",
    "by_seed",
    "dataset",
    "decide",
    "exact",
    "lanes",
    "last",
    "learn",
    "number",
    "select",
    "share_of_steps",
    "shuffled",
    "start",
    "steps_to",
    "tuned",
]
