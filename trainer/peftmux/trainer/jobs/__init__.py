"""Training many adapters at once: one base in memory, batches whose rows belong to different jobs."""
