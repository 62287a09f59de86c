"""Module names matched as PEFT matches them, by its own functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peftmux.adapters.config import read_fields
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.methods.lora import FIELDS
from peftmux.adapters.patterns import PatternMatcher
from peftmux.adapters.targets import target_sites

NAMES = [
    f"{stem}.{layer}.{leaf}"
    for stem in ("model.layers", "transformer.h", "layers", "model.vision.layers")
    for layer in (0, 1, 10)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.3.q_proj", "mlp.my_q_proj", "attn.c_attn")
] + ["lm_head", "q_proj"]

keys = st.sampled_from(
    [
        "q_proj",
        "self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "proj",
        r".*\.1\..*",
        "q_pro.",
        "model.layers.1",
        "attn",
        r"(self_attn|mlp)\..*",
        "model.layers.0.self_attn.q_proj",
        "modelxlayers.0.self_attn.q_proj",
        "self.attn.k_proj",
        "",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(keys, unique=True, max_size=4), st.sampled_from(NAMES))
@example(["self.attn.k_proj"], "model.layers.0.self_attn.k_proj")
def test_first_key_is_pefts(patterns, name):
    assert (PatternMatcher().first_key("rank_pattern", patterns, name) or name) == get_pattern_key(patterns, name)


modules = st.one_of(keys.filter(bool), st.lists(keys, min_size=1, max_size=3))
layers = st.one_of(st.none(), st.sampled_from([0, 1, [0, 10], [3], []]))
layers_patterns = st.one_of(st.none(), st.sampled_from(["layers", "h", ["h", "layers"], [], r"(layers|h)"]))


@settings(max_examples=300, deadline=None)
@given(modules, st.one_of(st.none(), modules), layers, layers_patterns)
def test_targets_are_pefts(target_modules, exclude_modules, layers_to_transform, layers_pattern):
    config = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    if isinstance(target_modules, list) and layers_to_transform not in (None, []):
        config |= {"layers_to_transform": layers_to_transform, "layers_pattern": layers_pattern}
    peft_config = SimpleNamespace(
        **({"layers_to_transform": None, "layers_pattern": None, "target_parameters": None} | config)
    )
    expected = [name for name in NAMES if check_target_module_exists(peft_config, name)]
    base = SimpleNamespace(
        linear_sites=dict.fromkeys(NAMES), module_names=frozenset(NAMES), architecture="X", vocab_size=1
    )
    try:
        got = target_sites(read_fields(config, FIELDS), [], base, PatternMatcher())
    except AdapterInvalid as error:
        assert (error.reason, expected) == ("NO_SITES", [])  # noqa: PT017
    else:
        assert sorted(got) == sorted(expected)


def test_the_budget_is_for_all_patterns_together():
    matcher = PatternMatcher(seconds=0.05)
    with pytest.raises(AdapterInvalid, match="too long"):
        matcher.first_key("rank_pattern", (f"[a-z]+{i}" for i in range(100_000)), "abcdef")
