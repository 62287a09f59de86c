"""One training run, from its options to its result, around transformers' Trainer."""
