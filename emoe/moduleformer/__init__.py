"""Parts of a ModuleFormer: router, experts, attention, block. The model itself is in `emoe.modeling`."""
