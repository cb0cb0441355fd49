"""Configuration of a ModuleFormer; field names as in the released models' config.json.

Source: Shen et al., "ModuleFormer: Modularity Emerges from Mixture-of-Experts", arXiv 2306.04640. This file is copied
beside each saved checkpoint and needs nothing but transformers.
"""

from transformers import PretrainedConfig

GATE_TYPES = ("mlp", "linear", "gmm", "all")
AUX_LOSS_TYPES = ("mi", "switch")
ATTENTION_TYPES = ("stick-breaking", "rotary")


class ModuleFormerConfig(PretrainedConfig):
    """Sizes and options of a `ModuleFormerModel`."""

    model_type = "moduleformer"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits", "routing"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 - transformers wants plain class attributes
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    vocab_size: int = 50295
    """Tokens."""
    block_size: int = 512
    """Tokens of a training sequence. Nothing in the model depends on it: there are no positions."""
    history_length: int = 512
    """Tokens that the released code kept tables for; read and written, not used."""
    n_embd: int = 1024
    """D: model width."""
    n_layer: int = 24
    """Blocks of attention and FFN."""
    n_head: int = 8
    """Heads of each attention expert."""
    att_hidden: int = 512
    """A: width of an attention expert, all its heads together. With A = D and one head, keys and values are the
    normalised hidden states themselves."""
    ffd_hidden: int = 2048
    """F: hidden width of an FFN expert."""
    activation_function: str = "gelu_new"
    """Activation of an FFN expert, by its name in transformers."""
    resid_pdrop: float = 0.0
    """Dropout behind attention and FFN."""
    embd_pdrop: float = 0.0
    """Dropout of embeddings."""
    moe_pdrop: float = 0.0
    """Dropout inside the gate "mlp"."""
    sample_topk: int = 0
    """In training, so many of the K experts are drawn from the gate's distribution instead of taken from its top."""
    gating_size: int = 256
    """Hidden width of the gates "mlp" and "gmm"."""
    n_att_experts: int = 32
    """E of attention."""
    k_att: int = 2
    """K of attention."""
    n_mlp_experts: int = 32
    """E of the FFN."""
    k_mlp: int = 2
    """K of the FFN."""
    att_groups: list | None = None
    """After surgery: attention experts of each layer as [under the softmax, added first, added next, …]; None: [E]."""
    mlp_groups: list | None = None
    """The same for the FFN."""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of new linear and embedding weights; experts start uniform within 1 / fan_in."""
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    aux_loss_type: str = "mi"
    """Balancing loss, summed over gates: "mi" (mutual information) or "switch" (with a tenth of the z-loss)."""
    aux_loss_weight: float = 0.0
    """Its factor beside the cross-entropy."""
    aux_marginal_weight: float = 1.0
    """Factor of H(m) within "mi", not among the released fields."""
    aux_conditional_weight: float = 1.0
    """Factor of H(m|x) within "mi", not among the released fields."""
    gate_type: str = "mlp"
    """"mlp", "linear" or "gmm" as released, or "all": no gate, every expert computed with weight 1, which is a dense
    model and needs K = E."""
    attention_type: str = "stick-breaking"
    """"stick-breaking" as released, or "rotary": softmax attention with rotary positions, for comparison."""
    rope_theta: float = 10000.0
    """Base of rotary frequencies."""
    output_router_logits: bool = False
    """Whether outputs hold the gates' logits and choices."""

    on_create = None
    """Called when a configuration is made; the installed package registers the model classes there, once."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.on_create is not None:
            self.on_create()
        self._one_of("gate_type", GATE_TYPES)
        self._one_of("aux_loss_type", AUX_LOSS_TYPES)
        self._one_of("attention_type", ATTENTION_TYPES)
        if self.att_hidden % self.n_head:
            raise ValueError(f"att_hidden={self.att_hidden} is not divisible by n_head={self.n_head}")
        if self.attention_type == "rotary" and self.att_hidden // self.n_head % 2:
            raise ValueError(
                f"rotary heads need an even width, not att_hidden / n_head = {self.att_hidden}/{self.n_head}"
            )
        for chosen, experts in (("k_att", "n_att_experts"), ("k_mlp", "n_mlp_experts")):
            k, e = getattr(self, chosen), getattr(self, experts)
            if not 1 <= k <= e:
                raise ValueError(f"{chosen}={k} must lie between 1 and {experts}={e}")
            if self.gate_type == "all" and k != e:
                raise ValueError(f"gate_type='all' computes every expert: set {chosen}={e}, not {k}")
            if not 0 <= self.sample_topk <= k:
                raise ValueError(f"sample_topk={self.sample_topk} must lie between 0 and {chosen}={k}")
            groups = getattr(self, experts.removeprefix("n_").removesuffix("_experts") + "_groups")
            if groups is not None:
                self._check_groups(groups, experts, e)

    def _check_groups(self, groups: list[list[int]], field: str, most: int) -> None:
        if len(groups) != self.n_layer or any(not group or group[0] < 1 or min(group) < 0 for group in groups):
            raise ValueError(f"the groups of {field} need an entry a layer, with at least one expert under the softmax")
        if max(group[0] for group in groups) != most:
            raise ValueError(f"{field}={most} must be the largest first group")

    def experts_of(self, kind: str, layer_index: int) -> list[int]:
        """Groups of experts of one layer: under the softmax, then those that were added; `kind` is "att" or "mlp"."""
        groups = getattr(self, f"{kind}_groups")
        return list(groups[layer_index]) if groups else [getattr(self, f"n_{kind}_experts")]

    def _one_of(self, field: str, known: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in known:
            raise ValueError(f"{field}={value!r} is unknown; known: {', '.join(known)}")

    @property
    def shares_keys_and_values(self) -> bool:
        """Whether keys and values are the normalised hidden states, without projections."""
        return self.att_hidden == self.n_embd and self.n_head == 1
