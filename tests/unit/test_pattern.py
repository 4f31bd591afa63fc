"""The layer pattern: what Megatron reads is what we read, and mistakes are pointed at."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backends import install_backends
from model.pattern import parse_pattern
from recipes.errors import ConfigError


def test_parts_of_a_pattern():
    pattern = parse_pattern("MEM|*E-/*E/*E")
    assert pattern.main == "MEM*E-"
    assert pattern.stages == ("MEM", "*E-")
    assert (pattern.mtp, pattern.mtp_depths) == ("*E", 2)
    assert pattern.num_layers == 6


def test_pattern_without_mtp_or_stages():
    pattern = parse_pattern("M")
    assert (pattern.main, pattern.stages, pattern.mtp, pattern.mtp_depths) == ("M", ("M",), "", 0)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("MEXE", ["hybrid_layer_pattern=MEXE", "'X' at position 2", "M (Mamba-2)", "E (MoE)"]),
        ("ME ME", ["' ' at position 2"]),
        ("MeM", ["'e' at position 1"]),
        ("", ["no layers", "at least one of M, *, E, -"]),
        ("/*E", ["no layers"]),
        ("ME||*E", ["part between | is empty", "each pipeline stage needs a layer"]),
        ("|ME", ["part between | is empty"]),
        ("ME|", ["part between | is empty"]),
        ("ME/", ["part after / is empty"]),
        ("ME/*E/", ["part after / is empty"]),
        ("ME/*E/ME", ["*E, ME differ", "needs them equal"]),
        ("M|E/*|E", ["'|' at position 5", "last stage"]),
    ],
)
def test_mistakes_are_located(pattern, said):
    with pytest.raises(ConfigError) as error:
        parse_pattern(pattern)
    for words in said:
        assert words in str(error.value)


layers = st.text("M*E-", min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(layers, min_size=1, max_size=3), layers, st.integers(0, 3))
def test_agrees_with_megatron(stages, mtp, depths):
    install_backends("host")
    from megatron.core.models.hybrid import hybrid_layer_allocation as megatron

    text = "|".join(stages) + f"/{mtp}" * depths
    ours, theirs = parse_pattern(text), megatron.parse_hybrid_pattern(text)
    assert list(ours.stages) == stages == theirs.main_pattern.split("|")
    assert ours.num_layers == megatron.get_hybrid_total_layer_count(text)
    assert len(ours.stages) == megatron.get_hybrid_total_pipeline_segment_count(text)
    assert (ours.mtp or None, ours.mtp_depths) == (theirs.mtp_pattern, theirs.mtp_num_depths)
