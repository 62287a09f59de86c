"""What a run writes: the adapter, its card, where they go."""
