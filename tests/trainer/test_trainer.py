"""Order, means, accumulation, files and clean-up of the two trainers, on tiny models made from configs."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from graft.trainer.metrics import exact_match
from graft.trainer.tokenizer_training import train_tokenizer
from graft.trainer.trainer import GraftSeq2SeqTrainer, GraftTrainer

TEXTS = [
    "the cat sat on the mat and looked at the dog",
    "a dog ran",
    "rain fell on the roof of the old house by the sea all night long",
    "green tea",
    "the old house by the sea had a red roof",
    "cat and dog",
    "all night the rain fell",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)


def tiny_bart(seed: int = 0) -> BartForConditionalGeneration:
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=300,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return BartForConditionalGeneration(config)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def seq2seq_rows(tokenizer, texts=TEXTS) -> Dataset:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return Dataset.from_dict(
        {
            "id": [f"row-{n}" for n in range(len(texts))],
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [row[1:6] + [2] if n % 2 else row[1:] for n, row in enumerate(ids)],
            "references": [[text] for text in texts],
            "source_tokens": [len(row) for row in ids],
            "truncated": [False] * len(ids),
            "length": [len(row) for row in ids],
        }
    )


def causal_rows(tokenizer, texts=TEXTS) -> Dataset:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    cut = [len(row) // 2 for row in ids]
    return Dataset.from_dict(
        {
            "id": [f"row-{n}" for n in range(len(texts))],
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [[-100] * c + row[c:] for row, c in zip(ids, cut, strict=True)],
            "prompt_ids": [row[:c] for row, c in zip(ids, cut, strict=True)],
            "references": [[text] for text in texts],
            "length": [len(row) for row in ids],
        }
    )


def padded(rows, value, left=False):
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + list(r) if left else list(r) + f for f, r in zip(fill, rows, strict=True)])


def collate(features):
    batch = {
        "input_ids": padded([f["input_ids"] for f in features], 1),
        "attention_mask": padded([f["attention_mask"] for f in features], 0),
        "labels": padded([f["labels"] for f in features], -100),
    }
    if "prompt_ids" in features[0]:
        batch["prompt_ids"] = padded([f["prompt_ids"] for f in features], 1, left=True)
        batch["prompt_mask"] = padded([[1] * len(f["prompt_ids"]) for f in features], 0, left=True)
    return batch


def seq2seq_trainer(folder, tokenizer, model=None, generate=True, rows=None, **options):
    given = {"per_device_eval_batch_size": 2, "predict_with_generate": generate} | options
    args = Seq2SeqTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given)
    rows = seq2seq_rows(tokenizer) if rows is None else rows
    return GraftSeq2SeqTrainer(
        model or tiny_bart(),
        args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset={"truncated": rows},
        processing_class=tokenizer,
        metrics=[exact_match],
        generation={"max_new_tokens": 6, "do_sample": False, "num_beams": 1},
    )


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluated_rows_keep_their_order_when_training_groups_by_length(tmp_path, tokenizer):
    trainer = seq2seq_trainer(tmp_path, tokenizer, train_sampling_strategy="group_by_length")
    trainer.evaluate()
    lines = lines_of(tmp_path / "predictions" / "eval_truncated-step-000000.jsonl")
    assert [line["id"] for line in lines] == [f"row-{n}" for n in range(len(TEXTS))]
    alone = seq2seq_trainer(tmp_path / "alone", tokenizer, per_device_eval_batch_size=1)
    alone.evaluate()
    assert [line["prediction"] for line in lines] == alone.evaluations["eval_truncated"].predictions


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_loss_does_not_depend_on_the_batch_size_and_equals_a_naive_mean(tmp_path, tokenizer, kind):
    rows = seq2seq_rows(tokenizer) if kind == "seq2seq" else causal_rows(tokenizer)
    model = (tiny_bart if kind == "seq2seq" else tiny_llama)().double()
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits[0]
        targets = labels[0] if kind == "seq2seq" else labels[0, 1:]
        for position, target in enumerate(targets.tolist()):
            if target != -100:
                total, count = total - float(logits[position].log_softmax(-1)[target]), count + 1
    losses = []
    for size in (1, 2, 3, 7):
        trainer = seq2seq_trainer(
            tmp_path, tokenizer, model, generate=False, rows=rows, per_device_eval_batch_size=size
        )
        metrics = trainer.evaluate()
        losses.append(metrics["eval_truncated_loss"])
        assert metrics["eval_truncated_perplexity"] == pytest.approx(math.exp(losses[-1]))
    assert losses == pytest.approx([total / count] * 4, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path, tokenizer, kind, smoothing):
    rows = (seq2seq_rows if kind == "seq2seq" else causal_rows)(tokenizer, TEXTS[:4])
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = seq2seq_trainer(
            tmp_path / f"{size}",
            tokenizer,
            tiny_bart() if kind == "seq2seq" else tiny_llama(),
            rows=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            label_smoothing_factor=smoothing,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            train_sampling_strategy="sequential",
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_prediction_files_hold_what_each_row_gave(tmp_path, tokenizer):
    trainer = seq2seq_trainer(tmp_path, tokenizer)
    output = trainer.predict(seq2seq_rows(tokenizer))
    lines = lines_of(tmp_path / "predictions" / "test.jsonl")
    assert len(lines) == len(TEXTS)
    for line, text in zip(lines, TEXTS, strict=True):
        assert set(line) == {
            "id", "prediction", "references", "scores", "source_tokens", "generated_tokens", "seconds", "truncated"
        }  # fmt: skip
        assert line["references"] == [text]
        assert set(line["scores"]) == {"loss", "exact_match"}
        assert line["source_tokens"] == len(tokenizer(text)["input_ids"])
        assert 0 <= line["generated_tokens"] <= 6
        assert line["seconds"] > 0
        assert line["truncated"] is False
    assert output.metrics["test_exact_match"] == trainer.evaluations["test"].values["exact_match"]


def test_causal_models_generate_from_the_prompt_alone(tmp_path, tokenizer):
    model, rows = tiny_llama(), causal_rows(tokenizer)
    trainer = seq2seq_trainer(tmp_path, tokenizer, model, rows=rows, per_device_eval_batch_size=4)
    trainer.evaluate()
    for row, prediction in zip(rows, trainer.evaluations["eval_truncated"].predictions, strict=True):
        prompt = torch.tensor([row["prompt_ids"]])
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        assert prediction == tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def test_no_pickled_arguments_and_no_tokens_are_saved(tmp_path, tokenizer):
    trainer = seq2seq_trainer(tmp_path, tokenizer, max_steps=1, save_steps=1, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    pickles = {path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.name for path in tmp_path.rglob("*.pt")} == {"checkpoint-1"}
    assert "max_steps" in json.loads((tmp_path / "training_args.json").read_text())
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*.json"))


class Attached:
    """An ability that leaves a mark on the model while it is attached."""

    columns = ()

    def training_kwargs(self, state):
        return {}

    @contextmanager
    def evaluating(self, model, view):
        model.attached_for = view
        try:
            yield None
        finally:
            del model.attached_for

    def save(self, folder):
        pass

    def card_section(self):
        return "attached"


def test_abilities_leave_the_model_after_an_exception_in_an_evaluation(tmp_path, tokenizer):
    trainer = seq2seq_trainer(tmp_path, tokenizer)
    trainer.abilities = [Attached()]
    seen = []

    def failing(predictions, references):
        raise AssertionError("a metric failed")

    def fail_late(module, args):
        seen.append(trainer.model.attached_for)
        if len(seen) > 3:
            raise RuntimeError("the model failed")

    hook = trainer.model.lm_head.register_forward_pre_hook(fail_late)
    with pytest.raises(RuntimeError, match="the model failed"):
        trainer.evaluate()
    assert set(seen) == {"truncated"}
    assert not hasattr(trainer.model, "attached_for")
    hook.remove()
    trainer.metrics = [failing]
    with pytest.raises(AssertionError, match="a metric failed"):
        trainer.evaluate()
    assert not hasattr(trainer.model, "attached_for")


def test_what_would_be_ignored_or_publish_pickles_is_refused(tmp_path, tokenizer):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_strategy="all_checkpoints")
    with pytest.raises(ValueError, match="hub_strategy.*all_checkpoints.*pickles.*every_save"):
        GraftTrainer(tiny_llama(), args)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="compute_metrics.*metrics"):
        GraftTrainer(tiny_llama(), args, compute_metrics=lambda prediction: {})
