"""The `vlm-prune` command."""
