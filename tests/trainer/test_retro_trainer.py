"""RetroTrainer: three losses, bits per byte, which weights decay; and that a model learns to read its neighbours."""

import math

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.trainer.others_neighbours import OthersNeighbours, of_other
from graft.trainer.retrieval_ability import decayed_parameters, scored_bytes
from graft.trainer.retro_trainer import RetroTrainer

CHUNK, LENGTH, VOCABULARY = 8, 24, 24


class PlantedFacts(Dataset):
    """Chunks of random tokens. The neighbour of a chunk is the chunk and what really follows; another one is noise."""

    def __init__(self, rows: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=rng)
        self.noise = torch.randint(1, VOCABULARY, (rows, LENGTH // CHUNK, 2 * CHUNK), generator=rng)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        chunks = torch.cat([ids, torch.zeros(CHUNK, dtype=torch.long)]).unfold(0, 2 * CHUNK, CHUNK)
        return {
            "input_ids": ids,
            "labels": ids,
            "position_ids": torch.arange(LENGTH),
            "retrieved": torch.stack([chunks, self.noise[index]], dim=1),
        }


def build_model(seed: int = 0) -> RetroForCausalLM:
    torch.manual_seed(seed)
    return RetroForCausalLM(
        RetroConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_encoder_layers=1,
            cross_attention_layers=[0, 1],
            chunk_size=CHUNK,
            eos_token_id=None,
        )
    )


def build_trainer(folder, model, rows=64, **options) -> RetroTrainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 16,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        **options,
    }
    return RetroTrainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=PlantedFacts(rows, 1),
        eval_dataset=PlantedFacts(20, 2),
        data_collator=DataCollatorForRetro(0),
    )


def test_evaluation_gives_the_loss_of_each_view(tmp_path):
    model = build_model().eval()
    metrics = build_trainer(tmp_path, model).evaluate()
    rows = PlantedFacts(20, 2)
    batch = DataCollatorForRetro(0)([rows[i] for i in range(20)])
    given = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    with torch.no_grad():
        retrieved = model(**given, retrieved=batch["retrieved"]).loss
        without = model(**given).loss
    assert metrics["eval_retrieved_loss"] == pytest.approx(retrieved.item(), rel=1e-5)
    assert metrics["eval_without_loss"] == pytest.approx(without.item(), rel=1e-5)
    assert len({metrics[f"eval_{view}_loss"] for view in ("retrieved", "without", "random")}) == 3


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_random_neighbours_are_those_of_the_row_half_the_data_set_away_whatever_the_batch(tmp_path, batch):
    model = build_model().eval()
    trainer = build_trainer(tmp_path, model, per_device_eval_batch_size=batch)
    trainer.evaluate()
    rows, given = PlantedFacts(20, 2), trainer.evaluations["eval_random"].per_sample["loss"]
    for index, loss in enumerate(given):
        row, other = rows[index], rows[(index + 10) % 20]
        with torch.no_grad():
            expected = model(
                row["input_ids"][None], labels=row["labels"][None], retrieved=other["retrieved"][None]
            ).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_row_alone_gets_the_neighbours_of_its_other_half():
    rows = PlantedFacts(1, 0)
    own, moved = rows[0]["retrieved"], OthersNeighbours(rows)[0]["retrieved"]
    assert torch.equal(moved, own[[1, 2, 0]])


def test_rows_of_other_lengths_are_gone_through_round_and_round():
    retrieved = torch.arange(4).view(2, 1, 2)
    assert of_other(retrieved, 5, False)[:, 0, 0].tolist() == [0, 2, 0, 2, 0]
    assert of_other(retrieved, 1, False)[:, 0, 0].tolist() == [0]


def test_a_data_set_may_refuse_the_model(tmp_path):
    class Chosen(PlantedFacts):
        def check_model(self, chunk_size, vocab_size):
            raise ValueError(f"not chunks of {chunk_size} with {vocab_size} tokens")

    trainer = build_trainer(tmp_path, build_model())
    options = {"data_collator": DataCollatorForRetro(0), "args": trainer.args}
    for data in ({"train_dataset": Chosen(2, 1)}, {"eval_dataset": Chosen(2, 1)}):
        with pytest.raises(ValueError, match="not chunks of 8 with 24 tokens"):
            RetroTrainer(build_model(), **options, **data)


class Words:
    """A tokenizer of two-byte words."""

    def decode(self, ids, skip_special_tokens):
        return "é" * len(ids)


def test_bits_per_byte_count_the_text_that_is_scored(tmp_path):
    labels = torch.tensor([5, 6, -100, 7])
    assert scored_bytes(labels, Words()) == 4
    trainer = build_trainer(tmp_path, build_model())
    trainer.processing_class = Words()
    metrics = trainer.evaluate()
    expected = metrics["eval_retrieved_loss"] / math.log(2) / 2
    assert metrics["eval_retrieved_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    trainer.processing_class = None


def test_only_matrices_of_linear_maps_decay():
    model = build_model()
    decayed = decayed_parameters(model)
    spared = [name for name, _ in model.named_parameters() if name not in decayed]
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert all("norm" in name or "bias" in name or "embed" in name or "null" in name for name in spared)
    assert "model.layers.0.cross_attention.null_key" in spared
    assert decayed == [name for name, _ in model.named_parameters() if name in set(decayed)]


def test_accumulated_gradients_train_as_one_batch(tmp_path):
    weights = []
    for batch, steps in ((32, 1), (8, 4)):
        model = build_model()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 2}
        build_trainer(tmp_path / str(batch), model, seed=3, **options).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_tiny_model_learns_to_read_its_neighbours(tmp_path):
    model = build_model()
    options = {"max_steps": 600, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50, "seed": 5}
    trainer = build_trainer(tmp_path, model, rows=20000, **options)
    trainer.train()
    losses = {view: trainer.evaluate()[f"eval_{view}_loss"] for view in ("retrieved", "without", "random")}
    # The first chunk cannot be known, the other two can: ln 23 = 3.1 nats a token by chance, about 1.0 at best.
    assert losses["retrieved"] < losses["without"] - 0.5, losses
    assert losses["retrieved"] < losses["random"] - 0.5, losses
