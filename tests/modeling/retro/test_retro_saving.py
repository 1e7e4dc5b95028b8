"""Saved, loaded, loaded where graft is absent, trained by two processes: always the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stranger import program_without
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import graft
import graft.registration
from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM, RetroModel
from graft.modeling.retro.retriever import FixedNeighbours
from graft.trainer.tokenizer_training import train_tokenizer


def build_model(**changes) -> RetroForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 16,
        "num_encoder_layers": 1,
        "cross_attention_layers": [1],
        "chunk_size": 4,
        "initializer_range": 0.5,
    }
    return RetroForCausalLM(RetroConfig(**{**sizes, **changes})).eval()


def inputs(batch: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 61, (batch, length), generator=rng)
    retrieved = torch.randint(0, 61, (batch, length // 4, 2, 8), generator=rng)
    return {"input_ids": ids, "retrieved": retrieved}


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "deepnorm": {"residual": "deepnorm", "norm": "gated_rms", "head_bias": True},
    "rela": {"attention": "rela", "position_embedding": "rotary+learned"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_gives_the_same_logits(variant, tmp_path):
    model = build_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RetroForCausalLM
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_the_body_alone_loads_from_a_whole_model(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert type(body) is RetroModel
    assert torch.equal(body(**inputs()).last_hidden_state, model.model(**inputs()).last_hidden_state)


STRANGER = (
    program_without("graft", "faiss")
    + """
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
given = torch.load(folder + "/given.pt", weights_only=True)
logits = model(**given["inputs"]).logits
assert torch.equal(logits, given["logits"])
found = given["found"]
tokens = model.generate(
    given["inputs"]["input_ids"], max_new_tokens=9, retriever=lambda chunks: found.expand(len(chunks), -1, -1)
)
assert torch.equal(tokens, given["tokens"])
model.save_pretrained(folder + "/again")
print(type(model).__module__)
"""
)


def test_the_saved_folder_works_where_graft_is_absent_and_can_be_saved_again(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    given = inputs()
    found = given["retrieved"][0, 0]
    tokens = model.generate(
        given["input_ids"], max_new_tokens=9, retriever=lambda chunks: found.expand(len(chunks), -1, -1)
    )
    logits = model(**given).logits
    torch.save({"inputs": given, "logits": logits, "found": found, "tokens": tokens}, tmp_path / "given.pt")
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    for folder in (tmp_path, tmp_path / "again"):
        run = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "graft" not in run.stdout.split(".")[0]
        (tmp_path / "again" / "given.pt").write_bytes((tmp_path / "given.pt").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_retro.RetroForCausalLM"


def test_public_names_are_the_classes_and_known_to_auto_classes():
    assert graft.RetroForCausalLM is RetroForCausalLM
    assert type(AutoConfig.for_model("graft_retro")) is RetroConfig


TWO_PROCESSES = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_retro_saving import build_model, inputs

torch.set_num_threads(1)
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
model = DistributedDataParallel(build_model().double().train())
given = {name: value[rank::2] for name, value in inputs(4).items()}
if rank == 1:
    given["retrieved"] = torch.zeros_like(given["retrieved"])  # no neighbour at all in this half
model(**given, labels=given["input_ids"]).loss.backward()
if rank == 0:
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, sys.argv[4])
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(TWO_PROCESSES)
    folders = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 2))  # this one, and tests/
    arguments = [folders, "{rank}", str(tmp_path / "meeting"), str(tmp_path / "gradients.pt")]
    runs = [
        subprocess.Popen([sys.executable, str(script), *(argument.format(rank=rank) for argument in arguments)])
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model, given = build_model().double().train(), inputs(4)
    given["retrieved"][1::2] = 0
    model(**given, labels=given["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert gradients[name] is not None, name
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_weights_on_the_disk_give_the_same_logits(tmp_path):
    model, given = build_model(), inputs()
    model.save_pretrained(tmp_path)
    offloaded = RetroForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert all(weight.is_meta for weight in offloaded.parameters())
    with torch.no_grad():
        assert torch.equal(offloaded(**given).logits, model(**given).logits)
        generated = offloaded.generate(given["input_ids"], retriever=FixedNeighbours(given["retrieved"][0, 0]))
        assert torch.equal(
            generated, model.generate(given["input_ids"], retriever=FixedNeighbours(given["retrieved"][0, 0]))
        )


def test_a_lora_on_every_linear_map_learns_is_saved_and_merged(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted, given = get_peft_model(build_model(), config), inputs()
    adapted(**given, labels=given["input_ids"]).loss.backward()
    trained = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted.eval()(**given).logits
        loaded = PeftModel.from_pretrained(build_model(), tmp_path).eval()
        assert torch.equal(loaded(**given).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**given).logits, expected, atol=1e-4, rtol=1e-4)


def test_generation_ends_behind_a_stop_string():
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, vocab_size=270, model_max_length=64)
    model = build_model(vocab_size=300)
    prompt = inputs()["input_ids"][:1]
    whole = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0]
    words = [tokenizer.decode(token) for token in whole[prompt.shape[1] :]]
    stop = next(word for word in words[1:] if word.isascii() and word.strip())
    count = next(n for n in range(1, 13) if stop in "".join(words[:n]))
    found = model.generate(prompt, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, do_sample=False)[0]
    assert found.tolist() == whole[: prompt.shape[1] + count].tolist()
    assert count < 12
