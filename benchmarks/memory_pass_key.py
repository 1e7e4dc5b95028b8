"""Pass keys in real documentation by length and depth: the last window alone, memory, what retrieval heads find, full
context, on the same documents.

python benchmarks/memory_pass_key.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Each document holds five sentences such as "The number of the hotel room is 48213." at five depths, in an order drawn
anew, so that one reading serves five questions. The model continues "The number of the hotel room is": an answer is
right if it begins with that number. Passages found are put in front of that in an ordinary prompt. Full context is
asked up to the trained length. Intervals are Wilson's, 95 %; after each document the file
benchmarks/results/memory_pass_key.json holds all answers.
"""

import argparse
import sys
from pathlib import Path

import pandas
import torch
from measuring import keep, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from graft import AttentionReport, UnlimiformerConfig, unlimiform
from graft.modeling.transformers_compat import cache_argument
from graft.modeling.unlimiformer.calibration import as_read

LEADS = (
    "The pass key of this text is",
    "The number of the hotel room is",
    "The height of the tower in feet is",
    "The price of the ticket in cents is",
    "The population of the village is",
)
PASSAGE = 48  # tokens
READINGS = {
    "memory, squeeze, 64 keys": {"positions": "squeeze", "keys_per_query": 64},
    "memory, origin, 64 keys": {"positions": "origin", "keys_per_query": 64},
    "memory, squeeze, all keys": {"positions": "squeeze", "keys_per_query": None},
}


def wilson(right: int, trials: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, scale = right / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z / scale * (share * (1 - share) / trials + (z / (2 * trials)) ** 2) ** 0.5
    return [round(max(0.0, middle - half), 3), round(min(1.0, middle + half), 3)]


def hide_keys(filler: torch.Tensor, length: int, leads, tokenizer, generator) -> tuple[torch.Tensor, list[int]]:
    """`length` tokens (1, length) of filler with a key for each lead, at depths 0.1, 0.3, ... in their order."""
    keys = torch.randint(10000, 100000, (len(leads),), generator=generator).tolist()
    sentences = [
        tokenizer(f"\n\n{lead} {key}.\n\n", add_special_tokens=False).input_ids
        for lead, key in zip(leads, keys, strict=True)
    ]
    rest = filler[: length - sum(map(len, sentences))]
    pieces, before = [], 0
    for number, sentence in enumerate(sentences):
        place = int((2 * number + 1) / (2 * len(leads)) * len(rest))
        pieces += [rest[before:place], torch.tensor(sentence)]
        before = place
    return torch.cat([*pieces, rest[before:]])[None], keys


class Asked:
    """One document and its questions, (leads, tokens), padded on the left."""

    def __init__(self, model, tokenizer, document: torch.Tensor, leads) -> None:
        self.model, self.tokenizer, self.document = model, tokenizer, document
        rows = [tokenizer(f"\n\n{lead}", add_special_tokens=False).input_ids for lead in leads]
        width = max(map(len, rows))
        self.questions = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def inputs(self, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The questions behind these texts, (leads, tokens)."""
        mask = torch.cat([torch.ones_like(texts), self.mask], dim=1)
        return {"input_ids": torch.cat([texts, self.questions], dim=1), "attention_mask": mask}

    @torch.no_grad()
    def answers(self, inputs) -> list[str]:
        made = self.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return [text.strip() for text in self.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :])]

    @torch.no_grad()
    def behind(self, text: torch.Tensor) -> list[str]:
        """Answers of the stock model behind one text (1, tokens), which is read once."""
        cache = DynamicCache(config=self.model.config)
        for part in text.split(1024, dim=1):
            self.model.model(part, use_cache=True, **cache_argument(cache))
        cache.batch_repeat_interleave(len(self.questions))
        return self.answers({**self.inputs(text.expand(len(self.questions), -1)), **cache_argument(cache)})

    @torch.no_grad()
    def found(self, memory, heads) -> list[str]:
        """Answers behind the passage that these heads read most for each question."""
        passages = []
        for question, mask in zip(self.questions, self.mask.bool(), strict=True):
            self.model(**memory.inputs(question[mask][None], record=(report := AttentionReport())))
            (passage,) = report.passages(self.tokenizer, count=1, length=PASSAGE, heads=heads)
            passages.append(self.document[0, passage.start : passage.end])
        return self.answers(self.inputs(torch.stack(passages)))


def ways(unlimited, tokenizer, document: torch.Tensor, leads) -> dict[str, list[str]]:
    """The answers of every way to the questions about one document."""
    model, window = unlimited.model, unlimited.window
    asked = Asked(model, tokenizer, document, leads)
    made = {"last window alone": asked.behind(document[:, -window:])}
    if document.shape[1] + 64 <= model.config.max_position_embeddings:
        made["full context"] = asked.behind(document)
    memory = unlimited.remember(document)
    for name, options in READINGS.items():
        read = as_read(model, memory, UnlimiformerConfig(**{**memory.config.to_dict(), **options}))
        made[name] = asked.answers(read.select([0] * len(leads)).inputs(asked.questions, asked.mask))
        if name == "memory, origin, 64 keys":
            made["passage that retrieval heads found"] = asked.found(read, unlimited.retrieval_heads(read))
    return made


def table(documents: list[dict]) -> list[dict]:
    """Right answers by length and way, over all depths and by depth."""
    rows = []
    for length in dict.fromkeys(document["length"] for document in documents):
        those = [document for document in documents if document["length"] == length]
        for way in those[0]["answers"]:
            right = [
                [said.startswith(str(key)) for said, key in zip(one["answers"][way], one["keys"], strict=True)]
                for one in those
            ]
            total, trials = sum(map(sum, right)), len(right) * len(LEADS)
            by_depth = [sum(depth) for depth in zip(*right, strict=True)]
            rows.append({"length": length, "way": way, "right": total, "trials": trials})
            rows[-1] |= {"interval": wilson(total, trials), "right by depth 0.1, 0.3, 0.5, 0.7, 0.9": by_depth}
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=Path, required=True, help="folder of graft's documentation data set")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--trials", type=int, default=2, help="documents of each length")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = pandas.read_parquet(arguments.documents / "documents-test.parquet").text
    longest = sorted((text for text in texts), key=len)[-arguments.trials :]
    fillers = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in longest]
    about, settings, documents = machine(), {key: str(value) for key, value in vars(arguments).items()}, []
    generator = torch.Generator().manual_seed(arguments.seed)
    with unlimiform(model, UnlimiformerConfig(window=arguments.window, overlap=0.25)) as unlimited:
        for length in arguments.lengths:
            for filler in fillers:
                leads = [LEADS[place] for place in torch.randperm(len(LEADS), generator=generator)]
                text = filler.repeat(1 + length // len(filler))
                document, keys = hide_keys(text, length, leads, tokenizer, generator)
                answers = ways(unlimited, tokenizer, document, leads)
                documents.append({"length": length, "leads": leads, "keys": keys, "answers": answers})
                rows = table(documents)
                keep("memory_pass_key", settings, [*rows, *documents], about)
            for row in rows:
                if row["length"] == length:
                    print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
