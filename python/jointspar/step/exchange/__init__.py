"""Stage 4, packed_grad to mean_grad: several ways to sum one packed buffer over the ranks, behind one interface."""

from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.choose import Chooser, candidates
from jointspar.step.exchange.interface import CustomExchange, Exchange, Slices
from jointspar.step.exchange.measure import Costs
from jointspar.step.exchange.ring import ring
from jointspar.step.exchange.two_shot import two_shot

__all__ = ["Chooser", "Costs", "CustomExchange", "Exchange", "Slices", "allreduce", "candidates", "ring", "two_shot"]
