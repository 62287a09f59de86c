"""The base model on its device: loading and probing, swapped layers, adapter sites, paged cache, runner, sampler."""
