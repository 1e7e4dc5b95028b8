"""Evaluation through a real memory: what is read, that rows do not depend on their batch, and that nothing stays."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_texts import BART, LLAMA, TOKENIZER, ids
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
)

from graft.configuration.configuration_unlimiformer import (
    UnlimiformerBartConfig,
    UnlimiformerConfig,
    UnlimiformerLlamaConfig,
)
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.trainer.abilities import MemoryAbility
from graft.trainer.collators import CausalEvaluationCollator, Seq2SeqCollator
from graft.trainer.trainer import GraftSeq2SeqTrainer

EXACT = UnlimiformerConfig(keys_per_query=None, positions="true", window=64, local_tokens=4)


def seq2seq_rows() -> Dataset:
    sources = [ids(n, length) for n, length in enumerate((70, 9, 24, 50))]
    return Dataset.from_dict(
        {
            "input_ids": sources,
            "attention_mask": [[1] * len(s) for s in sources],
            "labels": [ids(9 + n, 5) for n in range(4)],
        }
    )


def causal_rows(view: str) -> Dataset:
    columns = {"input_ids": [], "labels": [], "memory_ids": [], "prompt_ids": []}
    for n, length in enumerate((40, 0, 17, 3)):
        memory, local, scored = ids(n, length), ids(10 + n, 4), ids(20 + n, 2 + n)
        seen = local if view == "full" else memory + local
        columns["memory_ids"].append(memory)
        columns["prompt_ids"].append(seen)
        columns["input_ids"].append(seen + scored)
        columns["labels"].append([-100] * len(seen) + scored)
    if view != "full":
        del columns["memory_ids"]
    columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
    return Dataset.from_dict(columns)


def model_of(kind: str):
    torch.manual_seed(0)
    if kind == "seq2seq":
        return BartForConditionalGeneration(BartConfig(**BART)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).double().eval()


def trainer_of(folder, model, rows, config=None, batch_size=4, generate=True):
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, predict_with_generate=generate,
        per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    seq2seq = model.config.is_encoder_decoder
    return GraftSeq2SeqTrainer(
        model, args, processing_class=TOKENIZER, eval_dataset=rows, data_collator=Seq2SeqCollator(TOKENIZER),
        eval_collator=None if seq2seq else CausalEvaluationCollator(TOKENIZER),
        abilities=[MemoryAbility(config or UnlimiformerConfig(keys_per_query=6, window=16, local_tokens=4))],
        generation={"max_new_tokens": 4, "do_sample": False, "num_beams": 1},
    )  # fmt: skip


def fingerprint(model):
    hooks = [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids(3, 12)])).logits
    return hooks, configs, logits


def assert_untouched(model, before):
    hooks, configs, logits = fingerprint(model)
    assert (hooks, configs) == before[:2]
    assert torch.equal(logits, before[2])


def test_seq2seq_full_view_reads_the_whole_source(tmp_path):
    model, rows = model_of("seq2seq"), seq2seq_rows()
    before = fingerprint(model)
    trainer = trainer_of(tmp_path, model, {"full": rows, "truncated": rows.select([1])})
    trainer.evaluate()
    assert_untouched(model, before)
    config = trainer.abilities[0].config
    with unlimiform(model, config) as handle, torch.no_grad():
        for number, row in enumerate(rows):
            memory = handle.remember(torch.tensor([row["input_ids"]]))
            loss = float(model(**memory.inputs(), labels=torch.tensor([row["labels"]])).loss)
            assert trainer.evaluations["eval_full"].per_sample["loss"][number] == pytest.approx(loss, rel=1e-5)
            tokens = model.generate(**memory.inputs(), max_new_tokens=4, do_sample=False, num_beams=1)
            text = TOKENIZER.decode(tokens[0, 1:], skip_special_tokens=True).strip()
            assert trainer.evaluations["eval_full"].predictions[number] == text
    with torch.no_grad():
        row = rows[1]
        plain = float(model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss)
    assert trainer.evaluations["eval_truncated"].values["loss"] == pytest.approx(plain, rel=1e-5)


def test_causal_full_view_with_exact_memory_equals_full_context_also_for_rows_without_memory(tmp_path):
    model = model_of("causal")
    before = fingerprint(model)
    trainer = trainer_of(tmp_path, model, {"full": causal_rows("full"), "context": causal_rows("context")}, EXACT)
    trainer.evaluate()
    full, context = trainer.evaluations["eval_full"], trainer.evaluations["eval_context"]
    assert full.per_sample["loss"] == pytest.approx(context.per_sample["loss"], rel=1e-5)
    assert full.predictions == context.predictions
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_rows_do_not_depend_on_their_batch(tmp_path, kind):
    rows = seq2seq_rows() if kind == "seq2seq" else causal_rows("full")
    done = []
    for size in (1, 3, 4):
        trainer = trainer_of(tmp_path, model_of(kind), {"full": rows}, batch_size=size)
        trainer.evaluate()
        done.append(trainer.evaluations["eval_full"])
    for other in done[1:]:
        assert other.per_sample["loss"] == pytest.approx(done[0].per_sample["loss"], rel=1e-5)
        assert other.predictions == done[0].predictions


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_memory_leaves_the_model_after_an_exception_in_an_evaluation(tmp_path, kind):
    model = model_of(kind)
    before = fingerprint(model)
    trainer = trainer_of(tmp_path, model, {"full": seq2seq_rows() if kind == "seq2seq" else causal_rows("full")})

    def failing(rows):
        raise RuntimeError("a collator failed")

    trainer.eval_collator = failing
    with pytest.raises(RuntimeError, match="a collator failed"):
        trainer.evaluate()
    assert_untouched(model, before)
    trainer.eval_collator = None if kind == "seq2seq" else CausalEvaluationCollator(TOKENIZER)
    trainer.metrics = [lambda predictions, references: 1 / 0]
    model.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    model._forward_hooks.clear()
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_permanent_classes_give_what_an_attached_memory_gives_and_the_stock_in_views_without(tmp_path, kind):
    options = UnlimiformerConfig(keys_per_query=6, window=16, local_tokens=4)
    stock = model_of(kind)
    if kind == "seq2seq":
        model = UnlimiformerBart(UnlimiformerBartConfig(**BART, unlimiformer_config=options))
        views = {"full": seq2seq_rows(), "truncated": seq2seq_rows().select([1, 2])}  # 24 tokens > window
    else:
        model = UnlimiformerLlamaForCausalLM(UnlimiformerLlamaConfig(**LLAMA, unlimiformer_config=options))
        views = {"full": causal_rows("full"), "context": causal_rows("context")}
    model.double().eval().load_state_dict(stock.state_dict())
    done = []
    for one in (stock, model):
        trainer = trainer_of(tmp_path, one, views, options)
        trainer.evaluate()
        done.append(trainer.evaluations)
    for view in views:
        expected, got = (evaluations[f"eval_{view}"] for evaluations in done)
        assert got.per_sample["loss"] == pytest.approx(expected.per_sample["loss"], rel=1e-5)
        assert got.predictions == expected.predictions


def test_saved_options_and_card_name_what_is_not_the_default(tmp_path):
    ability = MemoryAbility(UnlimiformerConfig(keys_per_query=32))
    ability.save(tmp_path)
    assert UnlimiformerConfig(**json.loads((tmp_path / "memory.json").read_text())) == ability.config
    assert "`keys_per_query=32`" in ability.card_section()
    assert "the defaults" in MemoryAbility(UnlimiformerConfig()).card_section()
