"""Presets and example settings. Installed as the package `emoe_configs`, so that they travel with a wheel."""
