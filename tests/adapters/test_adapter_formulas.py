"""The single definitions that trainer and runtime share, against their plain forms."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from peftmux.adapters.base import KVShape
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import served_kinds
from peftmux.adapters.methods.dora import dora_out_scale, weight_norm
from peftmux.adapters.methods.lora import lora_scaling
from peftmux.adapters.methods.prefix import provisioned_shape, split_prefix
from peftmux.adapters.torch_base import TorchBase


def test_scaling():
    assert lora_scaling(16, 8, use_rslora=False) == 2
    assert lora_scaling(16, 4, use_rslora=True) == 8
    assert lora_scaling(3, 8, use_rslora=True) == pytest.approx(3 / math.sqrt(8))


@pytest.mark.parametrize(("out", "inside", "rank"), [(24, 40, 4), (63, 5, 7), (1, 1, 1)])
def test_weight_norm_is_that_of_the_merged_weight(out, inside, rank):
    torch.manual_seed(0)
    w, a, b = torch.randn(out, inside), torch.randn(rank, inside), torch.randn(out, rank)
    torch.testing.assert_close(weight_norm(w, a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1), rtol=1e-5, atol=1e-5)


def test_dora_gradients():
    """The norm itself is differentiable; the output scale treats it as a constant."""
    w, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (2, 5), (6, 2)))
    assert torch.autograd.gradcheck(lambda w, a, b: weight_norm(w, a, b, 0.5), (w, a, b))
    m = torch.rand(6, dtype=torch.float64, requires_grad=True)
    dora_out_scale(w, a, b, 0.5, m).sum().backward()
    assert a.grad is None
    torch.testing.assert_close(m.grad, 1 / weight_norm(w, a, b, 0.5))


def test_split_prefix_layout():
    """Layer by layer, keys before values, heads before features; narrower layers take the first of each."""
    shapes = (KVShape(2, 3, 3), KVShape(1, 2, 2))
    stored = torch.arange(2 * 24.0).view(2, 24)
    prefix = split_prefix(stored, shapes, provisioned_shape(shapes))
    assert prefix.first_position == prefix.length == 2
    assert prefix.keys[0][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert prefix.values[0][0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert prefix.keys[1][1].tolist() == [[36, 37]]
    assert prefix.values[1][1].tolist() == [[42, 43]]


@pytest.mark.parametrize("shapes", [(), (KVShape(2, 4, 3),), (KVShape(2, 4, 4), KVShape(4, 2, 2))])
def test_caches_that_pefts_layout_cannot_hold(shapes):
    with pytest.raises(AdapterInvalid):
        provisioned_shape(shapes)


def tiny(config_class, **fields):
    common = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.AutoModelForCausalLM.from_config(config_class(**(common | heads | fields)))


def test_torch_base_describes_the_model():
    model = tiny(transformers.Qwen2Config, tie_word_embeddings=True).train()
    model.lm_head.eval()
    base = TorchBase(model)
    assert base.architecture == "Qwen2ForCausalLM"
    assert (base.hidden_size, base.vocab_size, base.dtype) == (16, 32, torch.float32)
    assert base.kv_shapes == (KVShape(2, 4, 4),) * 2
    assert model.training, "probing put it back"
    assert not model.lm_head.training, "also where parts of it differ"
    q = base.linear_sites["model.layers.0.self_attn.q_proj"]
    assert (q.in_features, q.out_features, q.has_bias, q.conv1d) == (16, 16, True, False)
    assert base.bias("model.layers.0.self_attn.o_proj") is None
    assert "model.embed_tokens" in base.module_names
    assert "model.embed_tokens" not in base.linear_sites
    assert {"lora", "rslora", "dora", "prefix", "loramoe", "mixlora", "xlora"} <= set(served_kinds(base))


def test_torch_base_under_gradient_checkpointing():
    model = tiny(transformers.LlamaConfig)
    model.gradient_checkpointing_enable()
    assert TorchBase(model.train()).kv_shapes == (KVShape(2, 4, 4),) * 2


def test_torch_base_of_conv1d_and_no_grouped_heads():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=16)
    base = TorchBase(transformers.AutoModelForCausalLM.from_config(config))
    assert base.kv_shapes == (KVShape(4, 4, 4),) * 3
    site = base.linear_sites["transformer.h.0.attn.c_attn"]
    assert (site.in_features, site.out_features, site.conv1d) == (16, 48, True)
    assert base.weight(site.name).shape == (48, 16)


def test_torch_base_of_layers_that_differ():
    """Latent attention caches keys and values of different widths: no prefix of PEFT's can hold them."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    dense = {"first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 4, "n_routed_experts": 2}
    base = TorchBase(tiny(transformers.DeepseekV3Config, **latent, **dense))
    assert all(shape.key_dim != shape.value_dim for shape in base.kv_shapes)
    assert "lora" in served_kinds(base)
    assert "prefix" not in served_kinds(base)
