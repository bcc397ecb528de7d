"""BERT with experts in place of its feed-forward layers: what `coterie upcycle` makes of a BERT checkpoint.

Importing this module registers the type ``bert_moe`` with transformers' Auto classes. Experts and router have the
shape that transformers' own families have, so the seam, private training and both exchanges treat it like them.

Shape letters: N tokens (batch and time flattened), D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertOnlyMLMHead,
    BertPreTrainedModel,
)


class BertMoeConfig(BertConfig):  # type: ignore[misc]
    """A BERT config with experts.

    Attributes:
        num_experts: E, in every layer.
        num_experts_per_tok: K.
        norm_topk_prob: the K routing weights of a token sum to one. With K = 1 the router then gets no gradient.
    """

    model_type = "bert_moe"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True


@use_experts_implementation(has_gate=False, has_bias=True)
class BertMoeExperts(nn.Module):
    """E feed-forward layers: up_proj [E, F, D], activation, down_proj [E, D, F], both with bias."""

    def __init__(self, config: BertMoeConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, width))
        self.act_fn = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted: [N, D]. Plain; the seam computes the same faster."""
        out_ND = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            inner = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert]))
            result = F.linear(inner, self.down_proj[expert], self.down_proj_bias[expert])
            out_ND = out_ND.index_add(0, token, (result * top_k_weights[token, place, None]).to(out_ND.dtype))
        return out_ND


class BertMoeTopKRouter(nn.Module):
    """Chooses K experts for each token by a linear map and softmax."""

    def __init__(self, config: BertMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], routing weights [N, K], expert ids [N, K]."""
        logits_NE = F.linear(hidden_states, self.weight)
        routing_weights_NK, ids_NK = torch.topk(logits_NE.float().softmax(-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            routing_weights_NK = routing_weights_NK / routing_weights_NK.sum(-1, keepdim=True)
        return logits_NE, routing_weights_NK.to(logits_NE.dtype), ids_NK


class BertMoeBlock(nn.Module):
    """Stands where BERT's layers have ``intermediate``: routes every token through its experts."""

    def __init__(self, config: BertMoeConfig) -> None:
        super().__init__()
        self.gate = BertMoeTopKRouter(config)
        self.experts = BertMoeExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, routing_weights_NK, ids_NK = self.gate(flat_ND)
        out_ND: Tensor = self.experts(flat_ND, ids_NK, routing_weights_NK)
        return out_ND.view(hidden_states.shape)


class BertMoeOutput(nn.Module):
    """What follows the experts: dropout, residual and LayerNorm. BERT's own output layer without its matrix."""

    def __init__(self, config: BertMoeConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dropout(hidden_states) + input_tensor)
        return normed


class BertMoePreTrainedModel(BertPreTrainedModel):  # type: ignore[misc]
    """Weight initialisation of experts and router."""

    config_class = BertMoeConfig
    config: BertMoeConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the module's source and keeps the answer on the class, where these
        # classes would inherit what it found for dense BERT.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, BertMoeTopKRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BertMoeExperts):
            for weight in (module.up_proj, module.down_proj):
                initialization.normal_(weight, mean=0.0, std=std)
            for bias in (module.up_proj_bias, module.down_proj_bias):
                initialization.zeros_(bias)


class BertMoeModel(BertMoePreTrainedModel, BertModel):  # type: ignore[misc]
    """`BertModel` with experts in every layer."""

    def __init__(self, config: BertMoeConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for layer in self.encoder.layer:
            layer.intermediate = BertMoeBlock(config)
            layer.output = BertMoeOutput(config)
        self.post_init()


class BertMoeForSequenceClassification(BertMoePreTrainedModel, BertForSequenceClassification):  # type: ignore[misc]
    """`BertForSequenceClassification` over `BertMoeModel`."""

    def __init__(self, config: BertMoeConfig) -> None:
        # Not BertForSequenceClassification's own, which would make a dense BertModel of this config first: that costs
        # its memory, and transformers refuses it, because a dense class cannot take an experts implementation.
        super(BertForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.config = config
        own_rate = config.classifier_dropout
        self.bert: Any = BertMoeModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if own_rate is None else own_rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class BertMoeForMaskedLM(BertMoePreTrainedModel, BertForMaskedLM):  # type: ignore[misc]
    """`BertForMaskedLM` over `BertMoeModel`."""

    def __init__(self, config: BertMoeConfig) -> None:
        super(BertForMaskedLM, self).__init__(config)  # as above
        self.bert: Any = BertMoeModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()


AutoConfig.register(BertMoeConfig.model_type, BertMoeConfig, exist_ok=True)
AutoModel.register(BertMoeConfig, BertMoeModel, exist_ok=True)
AutoModelForMaskedLM.register(BertMoeConfig, BertMoeForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(BertMoeConfig, BertMoeForSequenceClassification, exist_ok=True)
