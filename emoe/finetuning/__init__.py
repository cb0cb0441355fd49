"""Training converted models."""
