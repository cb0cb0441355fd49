"""Average-key gate: the paper's. Nothing to fit; the router derives it from the weights (`routing_emoe.Router`)."""

from emoe.gating.spec import GateMethod

METHOD = GateMethod(
    name="average-key",
    reference="EMoE: Qiu, Huang, Fu, NAACL 2024, arXiv 2310.10908, sec. 3.2",
    summary="mean of the expert's keys; follows the weights through fine-tuning, stores nothing",
)
