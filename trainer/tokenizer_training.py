"""A byte-level BPE tokenizer trained on a run's own texts, for models that start from a config."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graft.atomic_files import new_folder
from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4, as BART's config expects them
TRAIN = "train"  # the value of `model.tokenizer` that asks for this


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """Learn at most `vocab_size` tokens from `texts`; every text can be encoded and comes back unchanged.

    Each sequence is wrapped in `<s> ... </s>`. Equal texts in equal order give an equal tokenizer.

    Raises:
        ConfigurationError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigurationError(
            f"To train a tokenizer, `vocab_size` must be at least {smallest}, for bytes and special tokens, got "
            f"{vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def trained_tokenizer(
    folder: Path, texts: Iterable[str], vocab_size: int, model_max_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, trained and saved there first if it is absent, so that a resumed run reuses it."""
    if not (folder / "tokenizer.json").is_file():
        tokenizer = train_tokenizer(texts, vocab_size, model_max_length)
        with new_folder(folder, replace=True) as unfinished:
            tokenizer.save_pretrained(unfinished)
        logger.info("A tokenizer of %d tokens was trained and saved in %s.", len(tokenizer), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
