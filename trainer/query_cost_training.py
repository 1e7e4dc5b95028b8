"""Training of a query cost model on measured plans, from nothing or on a new database (few-shot)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from graft.graphs.query_plan.measured_plans import MeasuredPlan
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph, collate_plans
from graft.modeling.query_graph.modeling_query_graph import QueryGraphForCostEstimation


def train_query_cost(
    model: QueryGraphForCostEstimation,
    plans: Sequence[MeasuredPlan],
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Fit the model to measured times with AdamW and one cycle of the learning rate; returns each epoch's mean loss.

    A new model begins at the median time of the plans. Training a trained one on a few plans of a new database with a
    smaller rate is the few-shot mode of Hilprecht and Binnig 2022, section 5.4: the same function, nothing is reset.

    Raises:
        ValueError: there are no plans, or an option is not above 0.
    """
    if not plans:
        raise ValueError("`plans` must hold at least one measured plan, got none.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    if not bool(model.head.bias.any()):  # new: a trained bias is not exactly zero
        times = torch.tensor([plan.milliseconds for plan in plans])
        model.head.bias.data.fill_(float(times.log().median()))
    steps = epochs * -(-len(plans) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(steps, 2))
    order, draw, losses = list(plans), random.Random(seed), []
    model.train()
    for _ in range(epochs):
        draw.shuffle(order)
        total = 0.0
        for begin in range(0, len(order), batch_size):
            some = order[begin : begin + batch_size]
            batch = collate_plans([plan.graph for plan in some], [plan.milliseconds for plan in some])
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += len(some) * loss.item()
        losses.append(total / len(order))
    model.eval()
    return losses


@torch.no_grad()
def estimate_milliseconds(
    model: QueryGraphForCostEstimation, graphs: Sequence[QueryPlanGraph], batch_size: int = 256
) -> list[float]:
    """Predicted time of each plan."""
    estimated: list[float] = []
    for begin in range(0, len(graphs), batch_size):
        batch = collate_plans(graphs[begin : begin + batch_size])
        output = model(**{name: value.to(model.device) for name, value in batch.items()})
        estimated += output.log_milliseconds.exp().tolist()
    return estimated
