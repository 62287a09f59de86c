"""The base model, and the places in it where adapters act on their rows."""
