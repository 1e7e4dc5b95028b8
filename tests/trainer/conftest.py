"""Tiny tokenizers of three kinds, trained on the spot, and configurations with little in them."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graft.trainer.config_file import from_dict
from graft.trainer.tokenizer_training import train_tokenizer

TEXTS = [
    f"The {noun} number {i} reads a long text, then answers." for i in range(30) for noun in ("cat", "dog", "model")
]


def byte_level():
    """Every text comes back; <s> and </s> around a sequence, as in BART."""
    return train_tokenizer(TEXTS, 300, 64)


def unigram():
    """As sentencepiece does it: spaces are part of the tokens, only </s> behind a sequence, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def word_piece():
    """Lower case, unknown words lost, no special tokens around a sequence and no end-of-sequence token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )


KINDS = {"byte_level": byte_level, "unigram": unigram, "word_piece": word_piece}


@pytest.fixture(scope="session")
def tokenizers():
    return {name: build() for name, build in KINDS.items()}


@pytest.fixture(scope="session")
def byte_tokenizer(tokenizers):
    return tokenizers["byte_level"]


@pytest.fixture
def blocks():
    """The least a configuration needs; tests change a copy."""
    return {
        "model": {"task": "seq2seq", "name": "somewhere"},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "training": {"output_dir": "out"},
    }


@pytest.fixture
def configure(blocks):
    """configure(task, data fields..., memory=...) -> RunConfiguration."""

    def build(task="seq2seq", memory=None, **data):
        changed = blocks | {"model": blocks["model"] | {"task": task}, "data": blocks["data"] | data}
        return from_dict(changed | ({} if memory is None else {"memory": memory}))

    return build
