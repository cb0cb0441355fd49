"""The analyses of the paper: what gains depend on, and what the routers do in training."""
