"""A tiny model, its data and a configuration file for the runs in these tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus
from graft.trainer.tokenizer_training import train_tokenizer

TEXT = "the cat sat on a mat near an old house by the sea while rain fell all night and nobody came home"
WORDS = TEXT.split(" ")


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start + 7 * step + step * step) % len(WORDS)] for step in range(length))


def write_data(folder: Path, train: int = 24, validation: int = 5) -> None:
    for name, count in (("train", train), ("validation", validation), ("test", 3)):
        rows = [
            {"name": f"{name}-{n}", "body": text(n, 12 + 9 * (n % 4)), "summary": text(n, 3)} for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, task: str, positions: int = 128) -> None:
    tokenizer = train_tokenizer([text(n, 40) for n in range(20)], vocab_size=320, model_max_length=positions)
    torch.manual_seed(0)
    if task == "seq2seq":
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=320,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=positions,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=positions,
                bos_token_id=0,
                pad_token_id=1,
                eos_token_id=2,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def configuration(folder: Path, task: str, **training) -> dict:
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    data |= {"source_column": "body", "target_column": "summary", "id_column": "name", "max_target_length": 16}
    data |= {"eval_views": ["truncated"]}
    common = {"output_dir": str(folder / "out"), "max_steps": 4, "logging_steps": 1, "save_steps": 2, "use_cpu": True}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True}
    common |= {"eval_strategy": "steps", "eval_steps": 2, "predict_with_generate": True, "learning_rate": 1e-3}
    return {
        "model": {"task": task, "name": str(folder / "model")},
        "data": data,
        "training": common | training,
        "generation": {"max_new_tokens": 8, "num_beams": 1, "do_sample": False},
        "metrics": ["rouge"],
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function of (task, **training options) that writes model, data and config.json to `tmp_path`."""

    def prepare(task: str, **training) -> Path:
        write_data(tmp_path)
        write_model(tmp_path / "model", task)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(configuration(tmp_path, task, **training)))
        return path

    return prepare


@pytest.fixture
def write_short_run(tmp_path: Path) -> Callable[..., str]:
    """A function of (blocks, changes) that writes config.json, around four steps of training on the CPU, changed."""

    def write(blocks: dict, changes: dict) -> str:
        training = {
            "output_dir": str(tmp_path / "out"), "max_steps": 4, "logging_steps": 1, "save_steps": 2, "use_cpu": True,
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True,
            "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2,
        }  # fmt: skip
        blocks = {**blocks, "training": training | blocks.get("training", {})}
        blocks |= {block: {**blocks.get(block, {}), **options} for block, options in changes.items()}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(blocks))
        return str(path)

    return write


@pytest.fixture
def losses_of() -> Callable[[Path], dict[int, float]]:
    """A function that reads step -> training loss from a run's metrics.jsonl."""

    def losses(folder: Path) -> dict[int, float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    return losses


@pytest.fixture
def interrupt() -> Callable[[Path], None]:
    """A function that leaves of a run of four steps what a kill behind its second one would have left."""

    def undo(folder: Path) -> None:
        shutil.rmtree(folder / "checkpoint-4")
        for file in [*folder.glob("*.safetensors"), folder / "trainer_state.json"]:
            file.unlink()
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))

    return undo


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """A folder with `corpus` and `held-out`, whose neighbours are in the first; chunks of 8, rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = [text(n, 30 + 5 * (n % 5)) for n in range(12)]
    tokenizer = train_tokenizer(texts, vocab_size=320, model_max_length=128)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=128, **sizes)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    embedder = ChunkEmbedder(folder / "encoder")
    settings = PreparationSettings(ChunkSettings(8), 2, 32, workers=1)
    rows = DatasetRows([{"text": each} for each in texts])
    corpus = prepare_corpus(rows, folder / "corpus", tokenizer, embedder, settings)
    others = DatasetRows([{"text": text(n, 40)} for n in range(20, 24)])
    prepare_corpus(others, folder / "held-out", tokenizer, embedder, settings, database=corpus)
    return folder


@pytest.fixture(scope="session")
def held_out(corpora: Path) -> Corpus:
    """The held-out corpus of `corpora`."""
    return Corpus(corpora / "held-out")
