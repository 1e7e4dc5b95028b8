"""What a LoRA adapter gains from training behind a memory: the same documents, tokens and steps with and without one.

python benchmarks/memory_adapter.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Two adapters of a frozen model learn the last `target` tokens of parts of training documents: one with nothing before
them (`training="standard"`), one behind a memory of the `memory` tokens before (`training="retrieval"`, memory read
without gradient). Base and both are scored on held-out documents after `local` tokens, alone and behind a memory;
differences come with a 95 % bootstrap interval over documents. Pass keys are asked as memory_pass_key.py asks them.
Adapters and scores are files in --run, so a stopped benchmark goes on.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import pandas
import torch
from measuring import bootstrap, keep, machine
from memory_pass_key import LEADS, Asked, hide_keys, wilson
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import UnlimiformerConfig, unlimiform
from graft.atomic_files import write_json
from graft.modeling.unlimiformer.calibration import next_token_losses
from graft.modeling.unlimiformer.training_regimes import training_with_memory

LORA = {"r": 10, "lora_alpha": 20, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
MODELS = ("base", "standard", "retrieval")


class Comparison:
    """The model, its adapters and the documents."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.run = arguments, arguments.run
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.config = UnlimiformerConfig(
            window=1024, overlap=0.25, keys_per_query=arguments.keys, training="retrieval"
        )

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.float32).eval()

    def documents(self, split: str, length: int, count: int) -> list[tuple[str, torch.Tensor]]:
        """(1, length) ids of so many documents, a part of each that is drawn with a seed."""
        table = pandas.read_parquet(self.arguments.documents / f"documents-{split}.parquet")
        draw, found = random.Random(0), []
        for row in table.sort_values("id").sample(frac=1, random_state=0).itertuples():
            ids = self.tokenizer(row.text[: 16 * length], return_tensors="pt").input_ids
            if ids.shape[1] >= length and len(found) < count:
                start = draw.randrange(ids.shape[1] - length + 1)
                found.append((row.id, ids[:, start : start + length]))
        return found

    def train(self, regime: str) -> None:
        """An adapter in a folder of its own, trained on one part of a document a step."""
        folder, given = self.run / regime, self.arguments
        if (folder / "curve.json").exists():
            return
        torch.manual_seed(0)
        model = self.base()
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
        weights = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        curve = []
        parts = self.documents("train", given.memory + given.target, given.steps)
        for step, (_, ids) in enumerate(tqdm(parts, desc=f"train {regime}")):
            text = ids[:, -given.target :]
            for group in optimizer.param_groups:
                group["lr"] = given.rate * min(1.0, (step + 1) / (0.1 * len(parts)), 1.1 - step / len(parts))
            batch = {"memory_ids": ids[:, : given.memory], "input_ids": text, "labels": text}
            if regime == "retrieval":
                with training_with_memory(model, self.config, batch, step) as inputs:
                    loss = model(**inputs).loss
            else:
                loss = model(input_ids=text, labels=text).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            curve.append(round(loss.item(), 4))
        adapted.save_pretrained(folder)
        write_json(folder / "curve.json", curve)

    def loaded(self, name: str):
        """The base, or the base with an adapter merged into it."""
        model = self.base()
        return model if name == "base" else PeftModel.from_pretrained(model, self.run / name).merge_and_unload()

    @torch.no_grad()
    def score(self, name: str) -> list[dict]:
        """Mean nats of each held-out document's last tokens, after the local ones alone and behind a memory."""
        path, given = self.run / f"{name}-scores.json", self.arguments
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        tests = self.documents("test", given.memory + given.local + given.scored, given.test)
        with unlimiform(self.loaded(name), self.config) as unlimited:
            for document, ids in tqdm(tests[len(found) :], desc=f"score {name}"):
                text = ids[:, given.memory :]
                ways = {"local": {"input_ids": text}}
                ways["memory"] = unlimited.remember(ids[:, : given.memory]).inputs(text)
                losses = {
                    way: float(next_token_losses(unlimited.model, inputs, given.scored).mean())
                    for way, inputs in ways.items()
                }
                found.append({"document": document, **losses})
                write_json(path, found)
        return found

    @torch.no_grad()
    def keys_found(self, name: str, length: int) -> list[bool]:
        """Whether each pass key of each document is recalled behind a memory."""
        path = self.run / f"{name}-keys-{length}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        texts = pandas.read_parquet(self.arguments.documents / "documents-test.parquet").text
        generator, right = torch.Generator().manual_seed(0), []
        with unlimiform(self.loaded(name), self.config) as unlimited:
            for text in tqdm(sorted(texts, key=len)[-self.arguments.key_documents :], desc=f"keys {name} {length}"):
                filler = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
                leads = [LEADS[place] for place in torch.randperm(len(LEADS), generator=generator)]
                filler = filler.repeat(1 + length // len(filler))
                document, keys = hide_keys(filler, length, leads, self.tokenizer, generator)
                asked = Asked(unlimited.model, self.tokenizer, document, leads)
                memory = unlimited.remember(document).select([0] * len(leads))
                answers = asked.answers(memory.inputs(asked.questions, asked.mask))
                right += [answer.startswith(str(key)) for answer, key in zip(answers, keys, strict=True)]
        write_json(path, right)
        return right


def rows_of(scores: dict[str, list[dict]], keys: dict[tuple[str, int], list[bool]]) -> list[dict]:
    """Perplexities, differences in nats (negative where the first is better) and pass keys."""
    ways = {
        f"{name}, {way}": [row[way] for row in found] for name, found in scores.items() for way in ("local", "memory")
    }
    rows = [{"row": name, "perplexity": round(math.exp(sum(nats) / len(nats)), 3)} for name, nats in ways.items()]
    pairs = [
        *((f"{name}, memory", f"{name}, local") for name in MODELS),
        *((f"{name}, {way}", f"base, {way}") for name in MODELS[1:] for way in ("local", "memory")),
        *((f"retrieval, {way}", f"standard, {way}") for way in ("local", "memory")),
    ]
    for first, second in pairs:
        gaps = [a - b for a, b in zip(ways[first], ways[second], strict=True)]
        worse = sum(gap > 0 for gap in gaps)
        rows.append({"difference": f"{first} - {second}", **bootstrap(gaps, [1] * len(gaps)), "worse": worse})
    for (name, length), right in keys.items():
        row = {"pass keys": name, "length": length, "right": sum(right), "trials": len(right)}
        rows.append(row | {"interval": wilson(sum(right), len(right))})
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--documents", type=Path, default=Path(".cache/documentation"))
    parser.add_argument("--run", type=Path, default=Path("runs/memory_adapter"), help="adapters and scores")
    parser.add_argument("--steps", type=int, default=24, help="of one document")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--memory", type=int, default=2048)
    parser.add_argument("--target", type=int, default=256, help="tokens that a training step predicts")
    parser.add_argument("--keys", type=int, default=64, help="kept by each query")
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--test", type=int, default=16, help="documents")
    parser.add_argument("--key-lengths", nargs="*", type=int, default=[4096], help="of documents that hold pass keys")
    parser.add_argument("--key-documents", type=int, default=4, help="of each length, five keys in each")
    given = parser.parse_args(argv)
    settings = {name: value for name, value in vars(given).items() if name not in ("model", "documents", "run")}
    given.run.mkdir(parents=True, exist_ok=True)
    about, comparison, scores, keys = machine(), Comparison(given), {}, {}
    for regime in MODELS[1:]:
        comparison.train(regime)
    for name in MODELS:
        scores[name] = comparison.score(name)
    for length in given.key_lengths:
        for name in MODELS:
            keys[name, length] = comparison.keys_found(name, length)
    rows = rows_of(scores, keys)
    for row in rows:
        print(row)
    curves = {name: json.loads((given.run / name / "curve.json").read_text("utf-8")) for name in MODELS[1:]}
    print(keep("memory_adapter", settings | {"curves": curves}, [*rows, {"losses": scores}], about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
