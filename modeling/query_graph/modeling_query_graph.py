"""A zero-shot cost model: the time of a query from its plan, on databases it never saw.

Hilprecht and Binnig 2022, "Zero-Shot Cost Models for Out-of-the-box Learned Cost Prediction", arXiv 2201.00561.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from ...configuration.configuration_query_graph import NODE_TYPES, QueryGraphConfig
from ..remote_code import SavesItsCode
from .plan_messages import PlanMessages, two_layers


@dataclass
class QueryCostOutput(ModelOutput):
    """What the model says about a batch of plans.

    Attributes:
        loss: mean |log predicted - log measured|, the logarithm of the geometric mean of the q-errors.
        log_milliseconds: (plans,) natural logarithm of the predicted time.
        embeddings: (plans, width) hidden states of the roots; plans alike have them alike.
    """

    loss: Tensor | None = None
    log_milliseconds: Tensor | None = None
    embeddings: Tensor | None = None


class QueryGraphForCostEstimation(SavesItsCode, PreTrainedModel):
    """log milliseconds = MLP(h_root), with h of `PlanMessages`."""

    config: QueryGraphConfig
    config_class = QueryGraphConfig
    main_input_name = "features"
    base_model_prefix = "messages"
    auto_classes = ("AutoModel",)

    def __init__(self, config: QueryGraphConfig) -> None:
        super().__init__(config)
        self.messages = PlanMessages(config)
        self.estimate = two_layers(config.hidden_size, config)
        self.head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            scale = self.config.initializer_range
            init.normal_(module.weight, 0.0, module.in_features**-0.5 if scale is None else scale)
            init.zeros_(module.bias)

    def forward(
        self,
        node_types: Tensor,
        features: Tensor,
        edges: Tensor,
        slots: Tensor,
        levels: Tensor,
        roots: Tensor,
        milliseconds: Tensor | None = None,
    ) -> QueryCostOutput:
        """Estimate the plans of a batch, as `collate_plans` makes it.

        Args:
            node_types, slots, levels, edges: as in QueryPlanGraph, of all plans together.
            features: (nodes, features).
            roots: (plans,) the root of each plan.
            milliseconds: (plans,) measured times, all above 0.

        Raises:
            ValueError: the features are not those that the model was made for, or a time is not above 0.
        """
        widest = max(self.config.feature_sizes or ())
        if features.shape[-1] != widest:
            raise ValueError(
                f"`features` must hold {widest} columns, the most of `feature_sizes` {self.config.feature_sizes} for "
                f"{NODE_TYPES}, got {features.shape[-1]}."
            )
        if milliseconds is not None and not bool((milliseconds > 0).all()):
            raise ValueError(f"`milliseconds` must be above 0, got {float(milliseconds.min())}.")
        embeddings = self.messages(node_types, features.to(self.dtype), edges, slots, levels)[roots]
        estimated = self.head(embeddings + self.estimate(embeddings)).squeeze(-1)
        loss = None if milliseconds is None else (estimated - milliseconds.log()).abs().mean()
        return QueryCostOutput(loss, estimated, embeddings)
