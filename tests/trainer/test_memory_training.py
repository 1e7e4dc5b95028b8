"""Training with memory through the Trainer: what is remembered of a row, how rows are batched, adapters that learn."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_texts import BART, LLAMA, TOKENIZER, ids
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
)

from graft.configuration.configuration_unlimiformer import UnlimiformerBartConfig, UnlimiformerConfig
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.training_regimes import training_with_memory
from graft.trainer.abilities import MemoryAbility
from graft.trainer.block_rules import check_blocks
from graft.trainer.collators import CausalMemoryCollator, Seq2SeqCollator
from graft.trainer.config_file import ConfigurationError
from graft.trainer.trainer import GraftSeq2SeqTrainer


def options(**changed):
    return UnlimiformerConfig(
        **{"keys_per_query": 6, "window": 16, "local_tokens": 6, "training": "retrieval", **changed}
    )


def rows_of(kind):
    """Four documents of different lengths; of a decoder two texts, and two prompts with answers."""
    sources = [ids(n, length) for n, length in enumerate((70, 9, 24, 50))]
    labels = [ids(9 + n, 3 + n) for n in range(4)]
    if kind == "causal":
        labels = [row if n < 2 else [-100] * (len(row) - 8) + row[-8:] for n, row in enumerate(sources)]
    columns = {"input_ids": sources, "attention_mask": [[1] * len(s) for s in sources], "labels": labels}
    return Dataset.from_dict(columns)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "seq2seq":
        return BartForConditionalGeneration(BartConfig(**BART))
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def trained(folder, model, kind, config, batch_size, accumulation):
    """The model after one optimizer step on all four rows."""
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, optim="sgd",
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, learning_rate=0.1,
        max_grad_norm=0.0, save_strategy="no",
    )  # fmt: skip
    seq2seq = kind == "seq2seq"
    collator = Seq2SeqCollator(TOKENIZER) if seq2seq else CausalMemoryCollator(TOKENIZER, config.local_tokens)
    trainer = GraftSeq2SeqTrainer(
        model, args, processing_class=TOKENIZER, train_dataset=rows_of(kind), data_collator=collator,
        abilities=[MemoryAbility(config)],
    )  # fmt: skip
    trainer.train()
    return model


def test_the_collator_remembers_all_but_the_last_tokens_and_all_of_an_answer_stays_local():
    rows = rows_of("causal")
    batch = CausalMemoryCollator(TOKENIZER, 6)(list(rows))
    ends = {0: 6, 1: 6, 2: 9, 3: 9}  # an answer of 8, and the token that predicts its first
    for n, end in ends.items():
        row = rows[n]["input_ids"]
        assert batch["input_ids"][n, -end:].tolist() == row[-end:]
        assert int(batch["attention_mask"][n].sum()) == end
        assert batch["memory_ids"][n, batch["memory_mask"][n].bool()].tolist() == row[:-end]
        assert batch["labels"][n].tolist() == [-100] * (9 - end + 1) + row[-end + 1 :]
    short = CausalMemoryCollator(TOKENIZER, 6)([{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}])
    assert short["memory_ids"].tolist() == [[7]]
    assert short["labels"].tolist() == [[-100, 9]]


@pytest.mark.parametrize("regime", ["retrieval", "alternating"])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_one_step_is_that_of_the_mean_over_all_target_tokens_however_rows_are_batched(tmp_path, kind, regime):
    config = options(training=regime)
    expected = model_of(kind).train()
    collator = Seq2SeqCollator(TOKENIZER) if kind == "seq2seq" else CausalMemoryCollator(TOKENIZER, 6)
    batch = collator(list(rows_of(kind)))
    with training_with_memory(expected, config, batch, 0) as inputs:
        expected(**inputs).loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    found = trained(tmp_path, model_of(kind), kind, config, batch_size=4, accumulation=1)
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    split = trained(tmp_path, model_of(kind), kind, config, batch_size=1, accumulation=4)
    for ours, theirs in zip(split.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_permanent_class_learns_as_the_attached_memory_does(tmp_path):
    config = options()
    model = UnlimiformerBart(UnlimiformerBartConfig(**BART, unlimiformer_config=config))
    model.load_state_dict(model_of("seq2seq").state_dict())
    ours = trained(tmp_path, model, "seq2seq", config, 4, 1)
    theirs = trained(tmp_path, model_of("seq2seq"), "seq2seq", config, 4, 1)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_memory_leaves_the_model_after_an_exception_in_training(tmp_path, kind):
    """The head fails within the step's forward, while the memory is attached."""
    model, given = model_of(kind).eval(), {"input_ids": torch.tensor([ids(3, 12)])}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before, attached = model(**given).logits, []

    def fail(module, args):
        attached.append([name for name, each in model.named_modules() if each._forward_pre_hooks])
        raise RuntimeError("the head failed")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the head failed"):
        trained(tmp_path, model, kind, options(), batch_size=4, accumulation=1)
    hook.remove()
    assert set(attached[0]) > {"lm_head"}  # the memory was there
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    after = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(one is other for one, other in zip(configs, after, strict=True))
    assert torch.equal(model.eval()(**given).logits, before)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_adapters_on_query_key_and_value_learn_through_the_memory(tmp_path, kind):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model_of(kind), lora)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(tmp_path, model, kind, options(memory_gradient=kind == "causal"), 4, 1)
    where = "encoder_attn" if kind == "seq2seq" else "self_attn"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("lora" in name for name in changed)
    for projection in ("q_proj", "k_proj", "v_proj"):
        assert any(f"{where}.{projection}" in name for name in changed), projection


REFUSED = {
    "checkpointing": ({"training": "random"}, {"gradient_checkpointing": True}, "seq2seq", "exclude each other"),
    "an encoder": ({"training": "retrieval", "memory_gradient": True}, {}, "seq2seq", "`memory.memory_gradient`"),
    "standard": ({"memory_gradient": True}, {}, "causal", "`memory.memory_gradient`"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_blocks_that_would_do_nothing_or_lose_the_memory_are_refused(configure, mistake):
    memory, training, task, message = REFUSED[mistake]
    configuration = configure(task)
    configuration.memory = UnlimiformerConfig(**memory)
    configuration.training.update(training)
    with pytest.raises(ConfigurationError, match=message):
        check_blocks(configuration)
