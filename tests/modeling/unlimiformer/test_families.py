"""What is served and what is refused: each refusal says why, and docs/memory.md lists what families.py does."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from graft.modeling.transformers_compat import cache_argument, defect_of
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


def stock_logits(model, answer):
    """Of answer tokens given at once, with a cache."""
    cache = cache_argument(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with torch.no_grad():
        return model(input_ids=torch.tensor([[7, 8, 9]]), decoder_input_ids=torch.tensor([answer]), **cache).logits


def test_fsmt_is_refused_where_its_cache_drops_answer_tokens_and_only_there():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "langs": ["en", "de"]}
    config = AutoConfig.for_model("fsmt", **sizes, src_vocab_size=40, tgt_vocab_size=40)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    is_whole = stock_logits(model, [3, 4, 5]).shape[1] == 3
    assert is_whole == (defect_of("fsmt", model) is None)
    if not is_whole:
        with pytest.raises(TypeError, match=r"FSMT.*transformers 5.*keeps only the last of several answer tokens"):
            unlimiform(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_umt5_is_refused_where_its_answer_tokens_see_later_ones_and_only_there(implementation):
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model("umt5", **sizes)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = (stock_logits(model, answer)[:, :2] for answer in ([3, 4, 5], [3, 4, 6]))
    is_causal = torch.allclose(first, second, atol=1e-9)
    assert is_causal == (defect_of("umt5", model) is None)
    if not is_causal:
        with pytest.raises(TypeError, match=r"UMT5.*under attn_implementation='sdpa'.*attn_implementation=\"eager\""):
            unlimiform(model)
