"""`jointspar reproduce`: a list of experiments becomes runs, results.json, figures and one page to read."""

from jointspar.training.reproduce.experiments import ListError
from jointspar.training.reproduce.main import reproduce
from jointspar.training.reproduce.process import Terminated
from jointspar.training.reproduce.runs import RunError

__all__ = ["ListError", "RunError", "Terminated", "reproduce"]
