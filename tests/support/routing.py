"""Settings that convert to a routing which stock formats know."""

FIXED = {"routing": "top-k", "allocation": "uniform", "held_out_tokens": 0}
KEY = FIXED | {"gate": "average-key"}
