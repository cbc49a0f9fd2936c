"""Balancing of experts: losses, and router biases."""

from quintet.modeling.balance import BiasBalancer, ExpertLoads, LoadBalancer
from quintet.training.balance.device_limited import DeviceLimitedBalance
from quintet.training.balance.dropping import TokenDropping
from quintet.training.balance.loss import BalanceLoss
from quintet.training.balance.routing import RoutedLayer, Routing, routing_of, texts_of
from quintet.training.balance.sequence import SequenceBalance
from quintet.training.balance.survey import loads_of_step
from quintet.training.balance.switch import Scope, SwitchBalance

__all__ = [
    "BalanceLoss",
    "BiasBalancer",
    "DeviceLimitedBalance",
    "ExpertLoads",
    "LoadBalancer",
    "RoutedLayer",
    "Routing",
    "Scope",
    "SequenceBalance",
    "SwitchBalance",
    "TokenDropping",
    "loads_of_step",
    "routing_of",
    "texts_of",
]
