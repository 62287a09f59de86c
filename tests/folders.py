"""What becomes of each folder of tests/fixtures: one line each, one place for every test that goes through them."""

from __future__ import annotations

GENERATES = {
    "adapterhub/llama/fusion": "fusion",
    "adapterhub/llama/houlsby_double_seq_bn": "houlsby",
    "adapterhub/llama/ia3": "ia3",
    "adapterhub/llama/lora": "lora",
    "adapterhub/llama/parallel_par_bn": "parallel",
    "adapterhub/llama/pfeiffer_leave_out_0": "pfeiffer",
    "adapterhub/llama/pfeiffer_seq_bn": "pfeiffer",
    "peft/llama/lora": "lora",
    "peft/llama/lora_alora": "lora",
    "peft/llama/lora_dora": "dora",
    "peft/llama/lora_dora_embed": "dora",
    "peft/llama/lora_dora_rslora": "dora",
    "peft/llama/lora_embed": "lora",
    "peft/llama/lora_embed_lmhead": "lora",
    "peft/llama/lora_exclude": "lora",
    "peft/llama/lora_layers_to_transform": "lora",
    "peft/llama/lora_modules_to_save": "lora",
    "peft/llama/lora_pissa": "lora",
    "peft/llama/lora_rank_alpha_pattern": "lora",
    "peft/llama/lora_rslora": "rslora",
    "peft/llama/lora_trainable_tokens": "lora",
    "peft/llama/adalora": "adalora",
    "peft/llama/beft": "beft",
    "peft/llama/ia3": "ia3",
    "peft/llama/ln_tuning": "ln",
    "peft/llama/loha": "loha",
    "peft/llama/lokr": "lokr",
    "peft/llama/lokr_both": "lokr",
    "peft/llama/shira": "shira",
    "peft/llama/trainable_tokens": "trainable-tokens",
    "peft/llama/vera": "vera",
    "peft/llama/vera_noproj": "vera",
    "peft/llama/multitask_prompt": "multitask-prompt",
    "peft/llama/prefix": "prefix",
    "peft/llama/prefix_projection": "prefix",
    "peft/llama/prompt_random": "prompt",
    "peft/llama/prompt_text": "prompt",
    "peft/llama/prompt_vocab": "prompt",
    "peft/llama/ptuning_lstm": "p-tuning",
    "peft/llama/ptuning_mlp": "p-tuning",
    "peft/qwen2/lora": "lora",
    "peft/qwen2/lora_alora": "lora",
    "peft/qwen2/lora_bias_all": "lora",
    "peft/qwen2/lora_bias_lora_only": "lora",
    "peft/qwen2/lora_bias_term": "lora",
    "peft/qwen2/lora_dora": "dora",
    "peft/qwen2/lora_dora_embed_lmhead": "dora",
    "peft/qwen2/lora_embed": "lora",
    "peft/qwen2/lora_modules_to_save": "lora",
    "peft/qwen2/lora_trainable_tokens": "lora",
    "peft/qwen2/ia3": "ia3",
    "peft/qwen2/prefix": "prefix",
    "peft/qwen2/prompt_random": "prompt",
}
"""Folder -> kind, of adapters of a causal language model."""
TASKS = {
    "peft/llama/multitask_prompt": (0, 2),
}
"""Folder -> the task that each row of its expected values is of."""
HALF = {
    "peft/llama/lora.bf16base": "lora",
    "peft/llama/lora_dora.bf16base": "dora",
}
"""As GENERATES, made on a bfloat16 base."""
CLASSIFIES = {
    "adapterhub/llama/pfeiffer_with_head": "pfeiffer",
    "peft/llama/lora.seq_cls": "lora",
    "peft/llama/lora.token_cls": "lora",
    "peft/llama/lora_dora.seq_cls": "dora",
    "peft/llama/lora_dora.token_cls": "dora",
    "peft/llama/adalora.seq_cls": "adalora",
    "peft/llama/adalora.token_cls": "adalora",
    "peft/llama/ia3.seq_cls": "ia3",
    "peft/llama/ia3.token_cls": "ia3",
    "peft/llama/ln_tuning.seq_cls": "ln",
    "peft/llama/ln_tuning.token_cls": "ln",
    "peft/llama/shira.seq_cls": "shira",
    "peft/llama/shira.token_cls": "shira",
    "peft/llama/prefix.seq_cls": "prefix",
    "peft/llama/prefix.token_cls": "prefix",
    "peft/llama/prompt_random.seq_cls": "prompt",
    "peft/llama/prompt_random.token_cls": "prompt",
    "peft/llama/ptuning_mlp.seq_cls": "p-tuning",
    "peft/llama/ptuning_mlp.token_cls": "p-tuning",
    "peft/qwen2/lora.seq_cls": "lora",
    "peft/qwen2/prefix.token_cls": "prefix",
}
"""Folder -> kind, of adapters with a sequence or token head."""
REFUSED = {
    "adapterhub/llama/prefix_tuning_flat": ("PICKLE", "peftmux adapters convert"),
    "peft/llama/adaption_prompt": ("UNSUPPORTED_METHOD", "ADAPTION_PROMPT"),
    "peft/llama/cartridge": ("UNSUPPORTED_METHOD", "CARTRIDGE"),
    "peft/llama/lora_bdlora": ("UNSUPPORTED_FIELD", "use_bdlora"),
    "peft/llama/miss": ("UNSUPPORTED_METHOD", "MISS"),
    "peft/llama/oft": ("UNSUPPORTED_METHOD", "OFT"),
    "peft/llama/shadow": ("UNSUPPORTED_METHOD", "SHADOW"),
    "peft/llama/xlora": ("MISSING_TENSOR", "classifier.layers.0.weight"),
}
"""Folder -> (reason, what the message names)."""
PIECES = {
    "peft/llama/xlora_expert0",
    "peft/llama/xlora_expert1",
}
"""Parts of other folders, without expected values of their own."""
