"""Saved, loaded, loaded where graft is absent: always the same model."""

import json
import math
import subprocess
import sys

import pytest
import torch
from stranger import program_without
from tiny_graph_llamas import SMALLER
from transformers import LlamaConfig, LlamaForCausalLM

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN

VARIANTS = {
    "gin": {"edges": {"transform": "silu"}, "output_projection": True, "mlp_ratio": 2.0},
    "differential": {"base_attention": True, "scale": 0.3, "differential": True, "differential_norm": True},
    "pna": {"attention": "pna", "mlp_ratio": 2.0},
    "pna_vector": {"attention": "pna_vector", "edges": {"transform": "silu", "trains_threshold": True}},
    "cg": {"attention": "cg", "latent": {"tokens_per_latent": [2, 4]}},
    "cg_interpolate": {"attention": "cg_interpolate", "latent": {"tokens_per_latent": [3], "mix": 0.3}},
    "sparse": {"attention": "llama", "sparse": {"rank": 6, "num_layers": 2, "scale_first": 0.4}, "layers": [1]},
    "heads": {
        "attention": "llama",
        "sparse": {"rank": 6, "per_head": True, "mixes_heads": True, "activation": "prelu", "scale_first": 0.4},
        "adjacency": {"normalises_rows": True},
    },
    "learned": {
        "attention": "llama",
        "sparse": {"rank": 6, "layer": "pna", "towers": 2, "scale_first": 0.4},
        "adjacency": {"combine": "learned", "learned_width": 5, "cutoff": None, "sharpness": None},
    },
    "hops": {"attention": "llama", "mlp": "multi_hop"},
    "aggregations": {"attention": "llama", "mlp": "multi_aggregation"},
}


def build_model(variant, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLMWithGNN(LlamaGNNConfig(**{**SMALLER, **changes}, gnn_config=VARIANTS[variant])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("variant", "tied"), [*((variant, False) for variant in VARIANTS), ("gin", True), ("cg", True)]
)
def test_a_loaded_model_gives_the_same_logits_and_has_the_same_options(variant, tied, tmp_path):
    model = build_model(variant, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = LlamaForCausalLMWithGNN.from_pretrained(tmp_path).eval()
    assert loaded.config.gnn_config == model.config.gnn_config
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_numbers_that_no_checkpoint_holds_are_set_though_weights_are_built_without_memory(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALLER)).save_pretrained(tmp_path)
    options = VARIANTS["cg_interpolate"], VARIANTS["differential"], VARIANTS["pna_vector"]
    models = [LlamaForCausalLMWithGNN.from_pretrained(tmp_path, gnn_config=each) for each in options]
    mixed, differential, vector = (model.model.layers[1].self_attn for model in models)
    assert mixed.mix.sigmoid().tolist() == pytest.approx([0.3])
    assert mixed.levels[0].latent_query.std().item() == pytest.approx(0.4, rel=0.5)
    assert differential.graph_scale.item() == pytest.approx(0.3)
    assert differential.gin.differential_lambda.item() == pytest.approx(0.8 - 0.6 * math.exp(-0.3))
    assert (differential.gin.differential_norm.weight == 1).all()
    assert vector.edges.threshold.item() == pytest.approx(0.2)


@pytest.mark.parametrize("variant", ["heads", "learned", "hops", "aggregations"])
def test_new_weights_beside_a_plain_llama_begin_as_in_a_new_model(tmp_path, variant):
    LlamaForCausalLM(LlamaConfig(**SMALLER)).save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, gnn_config=VARIANTS[variant])
    fresh = LlamaForCausalLMWithGNN(LlamaGNNConfig(**SMALLER, gnn_config=VARIANTS[variant]))
    plain = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in loaded.state_dict().items():
        assert weight.isfinite().all(), name
        expected = plain.get(name, fresh.state_dict()[name])
        if name in plain and plain[name].shape == weight.shape:
            assert torch.equal(weight, plain[name]), name
        elif weight.numel() < 30 and weight.unique().numel() > 1:  # few numbers drawn anew
            assert weight.abs().max() < 6 * SMALLER["initializer_range"], name
        else:  # many drawn anew, or all the same
            expected = expected.double()
            assert float(weight.double().std(correction=0)) == pytest.approx(
                float(expected.std(correction=0)), rel=0.6, abs=1e-6
            ), name
            assert float(weight.double().mean()) == pytest.approx(float(expected.mean()), abs=0.25), name


def test_nothing_of_the_old_weights_is_left_out_or_made_up_in_loading(tmp_path):
    build_model("sparse").save_pretrained(tmp_path)
    _, report = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


STRANGER = (
    program_without("graft", "faiss")
    + """
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    given = torch.load(folder + "/given.pt", weights_only=True)
    assert torch.equal(model(given["ids"]).logits, given["logits"])
    assert torch.equal(model.generate(given["ids"], max_new_tokens=5, do_sample=False), given["tokens"])
    model.save_pretrained(folder + "/again")
"""
)


def test_the_saved_folder_works_where_graft_is_absent_and_can_be_saved_again(tmp_path):
    folders = []
    for variant in ("gin", "learned", "hops", "cg_interpolate"):  # which need all files of the wing
        model, folder = build_model(variant), tmp_path / variant
        model.save_pretrained(folder)
        tokens = model.generate(ids(), max_new_tokens=5, do_sample=False)
        torch.save({"ids": ids(), "logits": model(ids()).logits, "tokens": tokens}, folder / "given.pt")
        folders.append(folder)
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    for part in ("", "again"):
        for folder in folders:
            (folder / part / "given.pt").write_bytes((folder / "given.pt").read_bytes())
        run = subprocess.run(
            [sys.executable, str(script), *(str(folder / part) for folder in folders)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_llama_gnn.LlamaForCausalLMWithGNN"
