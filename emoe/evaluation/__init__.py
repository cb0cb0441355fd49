"""Run folders read back, compared and swept."""
