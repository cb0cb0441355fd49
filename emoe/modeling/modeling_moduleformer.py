"""ModuleFormer: a causal language model whose attention heads and FFNs are both sparse mixtures of experts.

Source: Shen et al., "ModuleFormer: Modularity Emerges from Mixture-of-Experts", arXiv 2306.04640. Tensor names are
those of the released models (MoLM-350M-4B, 700M-4B, 700M-8B). Differences: padding has no part in attention and in
auxiliary losses, which are taken over the batch of all processes; a step of decoding is linear in the length.

Legend: B batch, T tokens, L keys, D model width, N = B * T tokens, E experts, K experts chosen.

This file and those that it imports are copied beside each saved checkpoint; with ``emoe_kernels`` installed it runs on
those kernels, without on their PyTorch paths.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .configuration_moduleformer import ModuleFormerConfig

try:
    from emoe.gating.losses import mutual_information, switch, z_loss
    from emoe.moduleformer.block import ModuleFormerBlock
    from emoe.moduleformer.experts import StackedLinear
    from emoe.moduleformer.router import Gate, Routing
except ImportError:  # a checkpoint on a machine without our packages brings its own copies
    from .block import ModuleFormerBlock
    from .experts import StackedLinear
    from .losses import mutual_information, switch, z_loss
    from .router import Gate, Routing

CONFIGURATION = "configuration_moduleformer.py"

SWITCH_Z_WEIGHT = 0.1
"""Factor of the z-loss within ``aux_loss_type="switch"``."""


@dataclass
class ModuleFormerOutput(MoeModelOutputWithPast):
    """As transformers', with what the gates did, layer by layer, attention before FFN."""

    aux_loss: torch.Tensor | None = None
    """Sum of the balancing losses of all gates, without its factor; None in steps of decoding."""
    routing: tuple[Routing, ...] | None = None
    """Choices of the gates; with ``output_router_logits``."""


@dataclass
class ModuleFormerCausalLMOutput(MoeCausalLMOutputWithPast):
    """As transformers', with the choices of the gates."""

    routing: tuple[Routing, ...] | None = None
    """As in `ModuleFormerOutput`."""


class ModuleFormerPreTrainedModel(PreTrainedModel):
    """What all ModuleFormer models share: initial weights, names, saving."""

    config_class = ModuleFormerConfig
    config: ModuleFormerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModuleFormerBlock"]  # noqa: RUF012 - transformers wants plain class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.mask$", r"\.attn\.cum_weight$"]  # noqa: RUF012
    _input_embed_layer = "wte"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StackedLinear):
            bound = 1 / module.weight.shape[1]
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, Gate) and module.kind == "gmm":
            init.normal_(module.expert_centroids)
            init.zeros_(module.temperature)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers', plus the modelling files, so that the copy loads on machines without our packages."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for name, text in code_files().items():
            (target / name).write_text(text, encoding="utf-8")
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """Embedding, blocks, final LayerNorm."""

    def __init__(self, config: ModuleFormerConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ModuleFormerBlock(config, index) for index in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> ModuleFormerOutput:
        """Hidden states of (B, T) tokens.

        Args:
            attention_mask: (B, L) 0 or False for padding, with the tokens in the cache.
            output_attentions: give the weights of each layer, (B, K, heads, T, L).
            output_router_logits: give each gate's logits (N, E), and its choices as ``routing``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        wanted = lambda value, name: getattr(self.config, name) if value is None else value  # noqa: E731
        output_attentions = wanted(output_attentions, "output_attentions")
        output_hidden_states = wanted(output_hidden_states, "output_hidden_states")
        output_router_logits = wanted(output_router_logits, "output_router_logits")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        h_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        T = h_BTD.shape[1]
        key_mask_BL = _key_mask(attention_mask, h_BTD.shape[0], past + T)

        h_BTD = self.drop(h_BTD)
        hidden, attentions, routing = [h_BTD], [], []
        for block in self.h:
            h_BTD, weights, *fields = block(h_BTD, key_mask_BL, past_key_values, bool(output_attentions))
            hidden.append(h_BTD)
            attentions.append(weights)
            routing += [Routing(*fields[start : start + 3]) for start in range(0, len(fields), 3)]
        h_BTD = hidden[-1] = self.ln_f(h_BTD)
        mask_N = None if key_mask_BL is None else key_mask_BL[:, past:].flatten()
        return ModuleFormerOutput(
            last_hidden_state=h_BTD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(r.logits_NE for r in routing) if output_router_logits else None,
            routing=tuple(routing) if output_router_logits else None,
            aux_loss=self._aux_loss(routing, mask_N) if routing and past == 0 else None,
        )

    def _aux_loss(self, routing: list[Routing], mask_N: torch.Tensor | None) -> torch.Tensor:
        """Σ over gates of the balancing loss; over all processes' tokens in training, when they step together."""
        losses = []
        for gate in routing:
            p_NE = gate.probabilities()
            if self.config.aux_loss_type == "mi":
                loss = mutual_information(
                    p_NE,
                    mask_N,
                    marginal_weight=self.config.aux_marginal_weight,
                    conditional_weight=self.config.aux_conditional_weight,
                    across_processes=self.training,
                )
            else:
                loss = switch(p_NE, gate.experts_NK, mask_N, across_processes=self.training)
                loss = loss + SWITCH_Z_WEIGHT * z_loss(gate.logits_NE, mask_N, across_processes=self.training)
            losses.append(loss)
        return torch.stack(losses).sum()


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """With a language-modelling head, not tied to the embedding unless the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: ModuleFormerConfig):
        super().__init__(config)
        self.transformer = ModuleFormerModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """What `generate` passes on for caches of fixed length: the (B, L) mask as it is, causal we are ourselves."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ModuleFormerCausalLMOutput:
        """Logits in fp32, and with `labels` (B, T; -100 is left out) cross-entropy + aux_loss_weight · Σ gates.

        `num_items_in_batch` counts the labels of all micro-batches of an optimizer step: each then adds its part.
        """
        found = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(found.last_hidden_state[:, keep]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            if self.config.aux_loss_weight and found.aux_loss is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                loss = loss + self.config.aux_loss_weight * share * found.aux_loss.to(loss.device)
        return ModuleFormerCausalLMOutput(
            loss=loss,
            aux_loss=found.aux_loss,
            logits=logits_BTV,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            router_logits=found.router_logits,
            routing=found.routing,
        )


class ModuleFormerForSequenceClassification(ModuleFormerPreTrainedModel):
    """Classifies by the hidden state of the last token that is not padding."""

    def __init__(self, config: ModuleFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ModuleFormerModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, labels); with `labels` the loss of ``config.problem_type`` + aux_loss_weight · Σ gates."""
        found = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        scores_BTC = self.score(found.last_hidden_state)
        B, T, _ = scores_BTC.shape
        last_B = self._last_token(input_ids, attention_mask, B, T)
        logits_BC = scores_BTC[torch.arange(B, device=scores_BTC.device), last_B.to(scores_BTC.device)]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores_BTC, labels=labels, pooled_logits=logits_BC, config=self.config)
            if self.config.aux_loss_weight and found.aux_loss is not None:
                loss = loss + self.config.aux_loss_weight * found.aux_loss.to(loss.device)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits_BC,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def _last_token(self, input_ids, attention_mask, B: int, T: int) -> torch.Tensor:
        """(B,) positions, by the mask if there is one, else by the padding token."""
        if attention_mask is not None:
            token_BT = attention_mask[:, -T:] != 0
        elif self.config.pad_token_id is not None and input_ids is not None:
            token_BT = input_ids != self.config.pad_token_id
        elif B == 1:
            return torch.tensor([T - 1])
        else:
            raise ValueError(
                "several sequences, but neither an attention_mask nor config.pad_token_id tells their ends"
            )
        return (token_BT * torch.arange(T, device=token_BT.device)).argmax(-1)


def _key_mask(attention_mask: torch.Tensor | None, B: int, L: int) -> torch.Tensor | None:
    """(B, L) bool, False for padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (B, L):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(B, L)}: a row a sequence, "
            "with the tokens in the cache"
        )
    return attention_mask.bool()


AUTO_MAP = {
    "AutoConfig": "configuration_moduleformer.ModuleFormerConfig",
    "AutoModel": "modeling_moduleformer.ModuleFormerModel",
    "AutoModelForCausalLM": "modeling_moduleformer.ModuleFormerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_moduleformer.ModuleFormerForSequenceClassification",
}
"""The ``auto_map`` of a checkpoint: with it the Auto classes load it where `emoe` is not installed."""


_SOURCES = {
    "router.py": "emoe.moduleformer.router",
    "experts.py": "emoe.moduleformer.experts",
    "attention.py": "emoe.moduleformer.attention",
    "rotary.py": "emoe.moduleformer.rotary",
    "block.py": "emoe.moduleformer.block",
    "ops.py": "emoe.moduleformer.ops",
    "losses.py": "emoe.gating.losses",
    "portable.py": "emoe_kernels.experts.portable",
    "linear_portable.py": "emoe_kernels.linear.portable",
    "stickbreaking_portable.py": "emoe_kernels.stickbreaking.portable",
}
"""Name beside a checkpoint → the module it is a copy of. One folder has one name each."""


def code_files() -> dict[str, str]:
    """The Python files that a checkpoint carries: name → text."""
    here = Path(__file__).parent
    own = {name: (here / name).read_text(encoding="utf-8") for name in (f"{Path(__file__).stem}.py", CONFIGURATION)}
    if (here / "block.py").exists():  # we are such a copy ourselves
        return own | {name: (here / name).read_text(encoding="utf-8") for name in _SOURCES}
    sources = {name: Path(find_spec(module).origin).read_text(encoding="utf-8") for name, module in _SOURCES.items()}
    return own | {name: text.replace("from ..experts.portable", "from .portable") for name, text in sources.items()}
