"""Points → sharded checkpoints, on Ray."""
