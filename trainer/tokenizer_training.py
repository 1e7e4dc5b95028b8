"""A byte-level BPE tokenizer trained on a run's own texts, for models that start from a config."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graft.atomic_files import new_folder
from graft.pages import line_plot_png
from graft.trainer.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

TRAIN = "train"  # the value of `model.tokenizer` that asks for this


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a trained tokenizer, which get the first ids in this order; `extra` come last."""

    bos: str = "<|begin_of_text|>"
    pad: str = "<|pad|>"
    eos: str = "<|eot_id|>"
    unk: str = "<|unk|>"
    mask: str = "<|mask|>"
    extra: tuple[str, ...] = ()

    def all(self) -> list[str]:
        """In the order of their ids."""
        return [self.bos, self.pad, self.eos, self.unk, self.mask, *self.extra]


BART_TOKENS = SpecialTokens("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as BART's config expects them


def train_byte_level_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special: SpecialTokens | None = None,
    model_max_length: int | None = None,
    ends: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most `vocab_size` tokens from `texts`; every text comes back unchanged.

    `save_pretrained` writes a folder that AutoTokenizer loads. Equal texts in equal order give an equal tokenizer.

    Args:
        texts: at least one that is not empty.
        vocab_size: with the 256 bytes and the special tokens.
        special: Llama 3's names by default.
        model_max_length: warns beyond it; None is no limit.
        ends: put the eos token behind every text; bos stands in front in any case.

    Raises:
        ConfigurationError: `vocab_size` leaves no room for bytes and special tokens, a special token is given twice,
            or there is no text.
    """
    special = special or SpecialTokens()
    names = special.all()
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"Special tokens must differ, got {', '.join(map(repr, twice))} more than once.")
    smallest = 256 + len(names)
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
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer=trainer)
    if not counted.characters:
        raise ConfigurationError("To train a tokenizer, `texts` must hold at least one text that is not empty.")
    end = f" {special.eos}" if ends else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special.bos} $A{end}",
        pair=f"{special.bos} $A{end}{end} $B{end}",
        special_tokens=[(special.bos, 0), (special.eos, 2)],
    )
    sides = {"cls_token": special.bos, "sep_token": special.eos} if ends else {}
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special.bos,
        pad_token=special.pad,
        eos_token=special.eos,
        unk_token=special.unk,
        mask_token=special.mask,
        **sides,
        **limit,
        **({"extra_special_tokens": list(special.extra)} if special.extra else {}),
    )


class _Counted:
    """The texts, and how many characters they had."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """As `train_byte_level_tokenizer`, with BART's special tokens and `<s> ... </s>` around each sequence."""
    return train_byte_level_tokenizer(texts, vocab_size, BART_TOKENS, model_max_length, ends=True)


def plot_token_lengths(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, path: str | Path, bins: int = 40
) -> Path:
    """Draw how many texts have how many tokens, special ones included, as a PNG.

    Raises:
        ValueError: there are no texts, or `bins` is below 1.
    """
    texts = list(texts)
    if not texts or bins < 1:
        raise ValueError(f"`texts` must not be empty and `bins` at least 1, got {len(texts)} texts, {bins} bins.")
    lengths = sorted(len(ids) for ids in tokenizer(texts)["input_ids"])
    width = max(1, -(-(lengths[-1] + 1) // bins))
    starts = range(0, lengths[-1] + 1, width)
    counts = [float(bisect_left(lengths, start + width) - bisect_left(lengths, start)) for start in starts]
    middles = [start + (width - 1) / 2 for start in starts]
    title = f"{len(lengths):,} texts; half have at most {lengths[(len(lengths) - 1) // 2]:,} tokens"
    return line_plot_png({"texts": (middles, counts)}, path, title, (f"tokens, by {width}", "texts"))


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
