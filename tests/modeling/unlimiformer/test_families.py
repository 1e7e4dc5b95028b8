"""What is served and what is refused: each refusal says why, and docs/memory.md lists what families.py does."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.families import DECODERS, ENCODER_DECODERS, REFUSED

AUTO = ("TextToWaveform", "Seq2SeqLM", "CausalLM", "SpeechSeq2Seq", "ImageTextToText")
SIZES = {
    "speech_to_text": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16},
    "hunyuan_v1_dense": {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 1},
}
QUICK = {"prophetnet", "trocr", "whisper", "t5gemma2", "falcon", "deepseek_v3", "lfm2", "gemma3n_text"}
QUICK |= {"llama4_text", "hunyuan_v1_dense"}


def model_of(family):
    """A stock model of `family` without weights, with whatever head it has."""
    try:
        config = AutoConfig.for_model(family, **SIZES.get(family, {}))
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    for name in AUTO:
        auto = getattr(transformers, f"AutoModelFor{name}")
        if type(config) in auto._model_mapping:
            try:
                with torch.device("meta"):
                    return auto.from_config(config)
            except ImportError as error:  # a picture encoder's library
                pytest.skip(str(error))
    raise AssertionError(f"{family} has no head that is known here")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in REFUSED]
)
def test_a_family_that_cannot_be_served_is_refused_by_name_with_the_reason_and_left_alone(family):
    model = model_of(family)
    modules = dict(model.named_modules())
    with pytest.raises(TypeError) as caught:
        unlimiform(model)
    assert re.search(rf"{type(model).__name__} \(model_type '[\w-]+'\)", str(caught.value))
    assert f": {REFUSED[family]}. Supported, " in str(caught.value)
    assert dict(model.named_modules()) == modules


def test_no_family_is_both_served_and_refused():
    assert not set(REFUSED) & {*DECODERS, *ENCODER_DECODERS}


def rows_of_the_documentation():
    """Each row of the two tables in docs/memory.md: what it says -> the families it lists."""
    text = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    section = text.partition("## Which models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    return {said: set(names.split(", ")) for said, names in rows if names != "families" and said != "---"}


def test_the_documentation_lists_the_families_that_are_served_each_where_it_belongs():
    rows = rows_of_the_documentation()
    swapped = {name for name, family in ENCODER_DECODERS.items() if family.swapped}
    encoders = {said: names for said, names in rows.items() if said.startswith("encoder-decoder")}
    assert sum(map(len, encoders.values())) == len(ENCODER_DECODERS)
    assert set().union(*encoders.values()) == set(ENCODER_DECODERS)
    assert next(names for said, names in encoders.items() if "exchanged" in said) == swapped
    decoders = {"rotary decoder": set(), "rotary decoder, neighbouring dimensions paired": set()}
    decoders["decoder with a table of positions"] = set()
    for name, family in DECODERS.items():
        paired = ", neighbouring dimensions paired" if family.pairing == "neighbours" else ""
        decoders[
            f"rotary decoder{paired}" if family.positions == "rotary" else "decoder with a table of positions"
        ] |= {name}
    assert {said: rows[said] for said in decoders} == decoders


def test_the_documentation_lists_the_families_that_are_refused_with_their_reason():
    rows, reasons = rows_of_the_documentation(), set(REFUSED.values())
    documented = {said: names for said, names in rows.items() if said in reasons}
    assert documented == {reason: {name for name in REFUSED if REFUSED[name] == reason} for reason in reasons}
