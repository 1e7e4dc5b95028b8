"""The folder in which a reader of README and docs stands: what the pages name is there, real and small."""

from pathlib import Path

import torch
from original_retro import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from graft.trainer.tokenizer_training import train_tokenizer

SENTENCES = [
    f"Captain Ahab saw the {what} near the {where} and wrote it down in the book of the ship, day {day}."
    for day, (what, where) in enumerate(
        (what, where) for what in ("whale", "storm", "sail", "crew", "moon") for where in ("bow", "mast", "island")
    )
]
TOKENS = 320
LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def book(start: int, sentences: int) -> str:
    """Sentences from `start` on, round and round."""
    return " ".join(SENTENCES[(start + number) % len(SENTENCES)] for number in range(sentences))


def write_texts(folder: Path) -> None:
    """book.txt, and the folders books/, held_out/ and notes/ of text files."""
    (folder / "book.txt").write_text(book(0, 60), encoding="utf-8")
    for name, starts in {"books": range(4), "held_out": (7, 11), "notes": (5,)}.items():
        (folder / name).mkdir()
        for start in starts:
            (folder / name / f"{start}.txt").write_text(book(start, 12 + start), encoding="utf-8")


def write_models(folder: Path) -> None:
    """MODEL (a Llama, under SmolLM2's name too), facebook/bart-base and ENCODER, of one tokenizer."""
    tokenizer = train_tokenizer(SENTENCES, vocab_size=TOKENS, model_max_length=2048)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    size, sides = len(tokenizer), ("encoder", "decoder")
    bart = {f"{side}_{what}": 2 for side in sides for what in ("layers", "attention_heads")}
    bart |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}
    marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    models = {
        "MODEL": LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=2048, **LAYERS, **marks)),
        "facebook/bart-base": BartForConditionalGeneration(BartConfig(vocab_size=size, **bart)),
        "ENCODER": BertModel(BertConfig(vocab_size=size, max_position_embeddings=256, **LAYERS)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "HuggingFaceTB").mkdir()
    (folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(folder / "MODEL")


def write_documentation(folder: Path) -> None:
    """documents-train.parquet, documents-validation.parquet, what configs/knowledge_graph_smollm2.json names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / ".cache" / "documentation").mkdir(parents=True)
    (folder / ".cache" / "smollm2-135m-instruct").symlink_to(folder / "MODEL")
    for split, starts in {"train": range(4), "validation": (7, 11)}.items():
        rows = pa.table({"id": [f"{split}.{n}" for n in starts], "text": [book(n, 40 + n) for n in starts]})
        pq.write_table(rows, folder / f"documents-{split}.parquet")
        (folder / ".cache" / "documentation" / f"documents-{split}.parquet").symlink_to(
            folder / f"documents-{split}.parquet"
        )


def write_corpora(folder: Path) -> None:
    """corpus/ and held_out_corpus/ with chunks of 64, corpus-of-32/; rows of two chunks."""
    from graft.retrieval.corpus.chunking import ChunkSettings
    from graft.retrieval.corpus.document_sources import open_source
    from graft.retrieval.corpus.embedder import ChunkEmbedder
    from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus

    embedder = ChunkEmbedder(folder / "ENCODER")
    for name, chunk_size in {"corpus": 64, "corpus-of-32": 32}.items():
        settings = PreparationSettings(ChunkSettings(chunk_size), 2, 2 * chunk_size, workers=1)
        corpus = prepare_corpus(open_source(folder / "books"), folder / name, folder / "MODEL", embedder, settings)
        if name == "corpus":
            others = (open_source(folder / "held_out"), folder / "held_out_corpus", folder / "MODEL")
            prepare_corpus(*others, embedder, settings, database=corpus)


def write_query_plans(folder: Path) -> None:
    """warehouse.duckdb with a table `orders`, and cost-model, untrained."""
    import duckdb

    from graft import QueryGraphConfig, QueryGraphForCostEstimation

    QueryGraphForCostEstimation(QueryGraphConfig(hidden_size=8)).save_pretrained(folder / "cost-model")
    with duckdb.connect(str(folder / "warehouse.duckdb")) as connection:
        connection.execute("CREATE TABLE orders AS SELECT range AS id, range % 7 AS kind FROM range(100)")


def write_original(folder: Path) -> None:
    """retro.pt, a state dict of RETRO-pytorch."""
    torch.save(checkpoint("rms", is_deepnet=False, encoder_width=24), folder / "retro.pt")


def write_adapters(folder: Path) -> None:
    """runs/long-bart, runs/adapter (a LoRA), runs/retrofit and the corpus it reads, corpora/train."""
    from peft import LoraConfig, get_peft_model

    from graft import RetroFitConfig, UnlimiformerBart

    UnlimiformerBart.from_pretrained(folder / "facebook" / "bart-base").save_pretrained(folder / "runs" / "long-bart")
    adapters = {"adapter": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])}
    adapters["retrofit"] = RetroFitConfig(chunk_size=32, task_type="CAUSAL_LM")
    for name, config in adapters.items():
        base = LlamaForCausalLM.from_pretrained(folder / "MODEL")
        get_peft_model(base, config).save_pretrained(folder / "runs" / name)
    (folder / "corpora").mkdir()
    (folder / "corpora" / "train").symlink_to(folder / "corpus-of-32")
