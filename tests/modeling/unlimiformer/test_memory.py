"""A memory is a value: saved and loaded bit for bit, selected without copies, moved, measured, checked."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.memory_files import DESCRIPTION_FILE
from graft.modeling.unlimiformer.report import AttentionReport

TENSORS_FILE = "memory.safetensors"
WINDOW, LENGTH = 16, 45
RULES = {
    "bart hidden": ("bart", {"store": "hidden", "keys_per_query": 4}),
    "bart keys": ("bart", {"store": "keys_values", "keys_per_query": 4}),
    "bart windows": ("bart", {"keys_per_query": 4, "heads": [1], "first_layer": 1, "first_step": "window"}),
    "bart bfloat16": ("bart", {"keys_per_query": 4, "memory_dtype": "bfloat16"}),
    "llama": ("llama", {"keys_per_query": 4}),
    "llama upper layers": ("llama", {"keys_per_query": 4, "first_layer": 1, "sinks": 2, "memory_dtype": "float16"}),
}


def remember(tiny, rule, rows=None):
    """The model, with its attachment, and a memory of three documents of different lengths."""
    family, options = RULES[rule]
    model = tiny.model(family)
    handle = unlimiform(model, UnlimiformerConfig(window=WINDOW, **options))
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 7, 30)] if rows is None else rows
    return model, handle.remember(*tiny.pad(rows, "right"))


def logits(model, memory, tiny):
    asked = tiny.ids(len(memory), 5, seed=9)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**memory.inputs(), decoder_input_ids=asked).logits
        return model(**memory.inputs(asked)).logits


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_memory_gives_the_logits_of_the_saved_one_bit_for_bit(tiny, tmp_path, rule):
    model, memory = remember(tiny, rule)
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "book"), model)
    assert torch.equal(logits(model, loaded, tiny), logits(model, memory, tiny))
    assert torch.equal(loaded.input_ids, memory.input_ids)
    assert torch.equal(loaded.lengths, memory.lengths)
    assert (loaded.config, loaded.window, loaded.documents) == (memory.config, memory.window, memory.documents)
    assert repr(loaded) == repr(memory)


@pytest.mark.parametrize("rule", ["bart hidden", "llama"])
def test_a_selection_is_saved_as_it_is(tiny, tmp_path, rule):
    model, memory = remember(tiny, rule)
    chosen = memory.select([2, 0, 2])
    loaded = Memory.from_pretrained(chosen.save_pretrained(tmp_path / "book"), model)
    assert torch.equal(logits(model, loaded, tiny), logits(model, chosen, tiny))


def test_a_memory_loads_into_a_reloaded_model(tiny, tmp_path):
    model, memory = remember(tiny, "llama")
    model.save_pretrained(tmp_path / "model")
    memory.save_pretrained(tmp_path / "book")
    again = type(model).from_pretrained(tmp_path / "model")
    with unlimiform(again, memory.config):
        loaded = Memory.from_pretrained(tmp_path / "book", again)
        assert torch.equal(logits(again, loaded, tiny), logits(model, memory, tiny))


def test_saving_where_something_is_already_is_refused_and_leaves_it(tiny, tmp_path):
    _, memory = remember(tiny, "llama")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        memory.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_other_weights_are_refused_with_both_fingerprints_and_accepted_if_asked(tiny, tmp_path):
    model, memory = remember(tiny, "llama")
    memory.save_pretrained(tmp_path / "book")
    other = tiny.model("llama", seed=1)
    with pytest.raises(ValueError, match=rf"weights {memory.fingerprint} of a llama, this llama has [0-9a-f]{{16}}"):
        Memory.from_pretrained(tmp_path / "book", other)
    with unlimiform(other, memory.config):
        loaded = Memory.from_pretrained(tmp_path / "book", other, strict=False)
        assert logits(other, loaded, tiny).isfinite().all()


def test_one_training_step_changes_the_fingerprint(tiny, tmp_path):
    model, memory = remember(tiny, "llama")
    memory.save_pretrained(tmp_path / "book")
    model(input_ids=tiny.ids(1, 8), labels=tiny.ids(1, 8)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with pytest.raises(ValueError, match="strict=False"):
        Memory.from_pretrained(tmp_path / "book", model)


def test_weights_of_another_shape_are_refused_even_if_not_strict(tiny, tmp_path):
    """Nothing could be read from keys of another size: one error says so, before any tensor is used."""
    _, memory = remember(tiny, "llama")
    memory.save_pretrained(tmp_path / "book")
    other = tiny.model("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="layer"):
        Memory.from_pretrained(tmp_path / "book", other, strict=False)


@pytest.mark.parametrize("name", [TENSORS_FILE, DESCRIPTION_FILE, "manifest.json"])
def test_a_missing_file_is_named(tiny, tmp_path, name):
    model, memory = remember(tiny, "bart hidden")
    (memory.save_pretrained(tmp_path / "book") / name).unlink()
    with pytest.raises(ValueError, match=rf"`folder` .*book.*{name}"):
        Memory.from_pretrained(tmp_path / "book", model)


@pytest.mark.parametrize("name", [TENSORS_FILE, DESCRIPTION_FILE])
@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_named(tiny, tmp_path, name, damage):
    model, memory = remember(tiny, "bart hidden")
    path = memory.save_pretrained(tmp_path / "book") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-5], "changed": content, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"`folder` .*book.*{name}"):
        Memory.from_pretrained(tmp_path / "book", model)


def test_a_folder_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"`folder` .*nowhere"):
        Memory.from_pretrained(tmp_path / "nowhere", tiny.model("bart"))


def test_a_memory_loads_from_a_folder_that_nobody_may_write(tiny, tmp_path):
    model, memory = remember(tiny, "llama")
    folder = memory.save_pretrained(tmp_path / "book")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    try:
        loaded = Memory.from_pretrained(folder, model)
        assert torch.equal(logits(model, loaded, tiny), logits(model, memory, tiny))
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


def test_a_saved_memory_is_json_and_safetensors_and_names_no_code(tiny, tmp_path):
    _, memory = remember(tiny, "llama")
    folder = memory.save_pretrained(tmp_path / "book")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    assert json.loads((folder / DESCRIPTION_FILE).read_text())["config"] == memory.config.to_dict()


def test_a_generation_changes_no_tensor_of_a_memory(tiny):
    for rule in ("bart hidden", "llama"):
        model, memory = remember(tiny, rule)
        before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
        asked = () if model.config.is_encoder_decoder else (tiny.ids(3, 4),)
        model.generate(**memory.inputs(*asked), max_new_tokens=4, num_beams=3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())


@pytest.mark.parametrize("rule", RULES)
def test_selected_rows_read_the_documents_they_name(tiny, rule):
    model, memory = remember(tiny, rule)
    whole = logits(model, memory, tiny)
    asked = tiny.ids(3, 5, seed=9)
    for rows in ([0, 1, 2], [2], [1, 2], [0, 2], [2, 1, 0, 0], [-1]):
        chosen = memory.select(rows)
        assert len(chosen) == len(rows)
        questions = asked[[row % 3 for row in rows]]
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                found = model(**chosen.inputs(), decoder_input_ids=questions).logits
            else:
                found = model(**chosen.inputs(questions)).logits
        # Few queries gather their values and many multiply all, which rounds differently in half precision.
        tolerance = 5e-2 if "bfloat16" in rule else 1e-3
        torch.testing.assert_close(found, whole[[row % 3 for row in rows]], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["bart hidden", "bart windows", "llama"])
def test_selecting_copies_nothing(tiny, rule):
    _, memory = remember(tiny, rule)
    stored = {tensor.untyped_storage().data_ptr() for tensor in memory.tensors().values()}
    for rows in ([0, 0, 1, 2], [1], [1, 2, 2]):
        chosen = memory.select(rows)
        assert {tensor.untyped_storage().data_ptr() for tensor in chosen.tensors().values()} <= stored
        assert chosen.nbytes <= memory.nbytes


def test_selecting_twice_is_selecting_once(tiny):
    model, memory = remember(tiny, "llama")
    twice, once = memory.select([2, 1]).select([1, 1, 0]), memory.select([1, 1, 2])
    assert torch.equal(logits(model, twice, tiny), logits(model, once, tiny))


@pytest.mark.parametrize("rows", [[3], [-4], [0, 7], []])
def test_rows_out_of_range_are_refused_with_the_number_of_documents(tiny, rows):
    _, memory = remember(tiny, "bart hidden")
    with pytest.raises(
        ValueError, match=rf"`rows` must name some of the 3 documents, got \[{', '.join(map(str, rows))}\]"
    ):
        memory.select(rows)


def test_iterating_over_a_memory_gives_each_document_and_ends(tiny):
    _, memory = remember(tiny, "bart hidden")
    assert [int(one.lengths) for one, _ in zip(memory, range(9), strict=False)] == [LENGTH, 7, 30]


@pytest.mark.parametrize("rule", ["bart hidden", "llama"])
def test_to_another_dtype_halves_the_bytes_and_leaves_the_original(tiny, rule):
    model, memory = remember(tiny, rule)
    moved = memory.to(dtype=torch.bfloat16)
    assert moved.nbytes * 2 == memory.nbytes
    assert all(tensor.dtype == torch.bfloat16 for tensor in moved.tensors().values())
    assert all(tensor.dtype == torch.float32 for tensor in memory.tensors().values())
    before, after = logits(model, memory, tiny), logits(model, moved, tiny)
    assert after.dtype == before.dtype
    assert 0 < (before - after).abs().mean() < 0.1 * before.abs().mean()


@pytest.mark.parametrize("rule", ["bart hidden", "bart keys", "llama"])
def test_a_half_precision_memory_keeps_at_least_nine_in_ten_of_the_keys_of_a_full_one(tiny, rule):
    model, memory = remember(tiny, rule, rows=[tiny.ids(300, seed=1)])
    asked, kept = tiny.ids(1, 20, seed=9), []
    for each in (memory, memory.to(dtype=torch.bfloat16)):
        report = AttentionReport()
        prompt = {"decoder_input_ids": asked} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model(**each.inputs(None if prompt else asked, record=report), **prompt)
        places = itertools.product(report.steps, range(3), range(4))
        kept.append([set(report.tokens(*place)[0].tolist()) for place in places])
    overlap = sum(len(one & other) for one, other in zip(*kept, strict=True)) / sum(map(len, kept[0]))
    assert 0.9 < overlap <= 1


def test_to_a_device_moves_every_tensor(tiny):
    _, memory = remember(tiny, "bart windows")
    moved = memory.to("meta")
    assert {tensor.device.type for tensor in (*moved.tensors().values(), moved.input_ids)} == {"meta"}


@pytest.mark.parametrize(
    ("rule", "bytes_per_token"),
    [
        ("bart hidden", 32 * 4),  # hidden_size floats
        ("bart bfloat16", 32 * 2),
        ("bart keys", 2 * 3 * 32 * 4),  # keys and values of 3 layers
        ("llama", 2 * 3 * 16 * 4),  # two key heads of 8
        ("llama upper layers", 2 * 2 * 16 * 2),
    ],
)
def test_nbytes_are_those_the_store_promises(tiny, rule, bytes_per_token):
    _, memory = remember(tiny, rule)
    assert memory.nbytes == 3 * LENGTH * bytes_per_token


def test_length_is_the_number_of_documents_and_lengths_those_of_their_tokens(tiny):
    _, memory = remember(tiny, "bart hidden")
    assert len(memory) == 3
    assert memory.lengths.tolist() == [LENGTH, 7, 30]
    assert len(memory[1]) == 1


@pytest.mark.parametrize(
    ("keys_per_query", "said"),
    [
        (None, "exact"),
        (LENGTH, "exact"),
        (LENGTH + 99, "exact"),
        (4, f"keys 4 of {LENGTH}"),
        ("window", f"keys 16 of {LENGTH}"),
    ],
)
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_repr_says_whether_reading_is_exact_or_how_many_keys_are_kept(tiny, family, keys_per_query, said):
    with unlimiform(tiny.model(family), UnlimiformerConfig(window=WINDOW, keys_per_query=keys_per_query)) as handle:
        memory = handle.remember(tiny.ids(1, LENGTH))
    assert f", {said})" in repr(memory)
    assert "Memory(1 documents of 45 tokens" in repr(memory)


@pytest.mark.parametrize("options", [{"exclude_window": True}, {"heads": [0]}, {"first_step": "window"}])
def test_a_memory_that_hides_keys_from_some_queries_does_not_call_itself_exact(tiny, options):
    config = UnlimiformerConfig(window=WINDOW, keys_per_query=None, **options)
    with unlimiform(tiny.model("bart"), config) as handle:
        assert "exact" not in repr(handle.remember(tiny.ids(1, LENGTH)))


def test_questions_and_documents_in_different_numbers_are_refused_with_both(tiny):
    _, memory = remember(tiny, "llama")
    with pytest.raises(ValueError, match=r"\(3, tokens\).*3 documents, got \(2, 5\).*select"):
        memory.inputs(tiny.ids(2, 5))


def test_a_question_mask_of_another_shape_is_refused_with_both(tiny):
    _, memory = remember(tiny, "llama")
    with pytest.raises(
        ValueError, match=r"`question_mask` must have the shape of `question_ids`, \(3, 5\), got \(3, 4\)"
    ):
        memory.inputs(tiny.ids(3, 5), torch.ones(3, 4))


def test_a_decoder_needs_a_question(tiny):
    _, memory = remember(tiny, "llama")
    with pytest.raises(ValueError, match="`question_ids` is None"):
        memory.inputs()


def test_a_question_longer_than_the_room_behind_the_memory_is_refused_with_the_room(tiny):
    _, memory = remember(tiny, "llama")
    room = 128 - WINDOW
    memory.inputs(tiny.ids(3, room))
    with pytest.raises(
        ValueError, match=rf"`question_ids` has {room + 1} tokens after {WINDOW} positions.*128.*`window`"
    ):
        memory.inputs(tiny.ids(3, room + 1))


def test_a_question_longer_than_the_reserve_of_a_table_is_refused_with_its_name(tiny):
    with unlimiform(tiny.model("gpt2"), UnlimiformerConfig(reserve=28)) as handle:
        memory = handle.remember(tiny.ids(1, 110))
    memory.inputs(tiny.ids(1, 28))
    with pytest.raises(ValueError, match=r"`question_ids` has 29 tokens after 100 positions.*128.*larger `reserve`"):
        memory.inputs(tiny.ids(1, 29))


@pytest.mark.parametrize("wrong", [61, 9999, -1])
@pytest.mark.parametrize("rule", ["bart hidden", "llama"])
def test_question_ids_outside_the_vocabulary_are_refused_with_the_first_place_but_not_in_padding(tiny, rule, wrong):
    _, memory = remember(tiny, rule)
    question, real = tiny.ids(3, 5), torch.ones(3, 5, dtype=torch.long)
    question[1, 0], real[1, 0] = wrong, 0
    memory.inputs(question, real)
    question[2, 3] = question[2, 4] = wrong
    with pytest.raises(ValueError, match=rf"`question_ids` holds {wrong} at position 3 of row 2.*vocabulary of 61"):
        memory.inputs(question, real)


@pytest.mark.parametrize(("rule", "room"), [("llama", 128 - WINDOW - 5), ("bart hidden", 64 - 6)])
def test_more_new_tokens_than_the_model_has_positions_for_are_refused_before_any_is_made(tiny, rule, room):
    model, memory = remember(tiny, rule)
    question = tiny.ids(3, 5)
    allowed = {"max_new_tokens": room + 1, "min_new_tokens": room + 1}  # the last token is never placed
    made = model.generate(**memory.inputs(question, max_new_tokens=room + 1), **allowed)
    assert made.shape[1] == (5 if rule == "llama" else 6) + room + 1  # BART begins with a token of its own
    with pytest.raises(ValueError, match=rf"has 5 tokens and `max_new_tokens` is {room + 2} after .* trained on"):
        memory.inputs(question, max_new_tokens=room + 2)


@pytest.mark.parametrize(("family", "room"), [("bart", 64), ("marian", 64), ("llama", 128 - WINDOW - 8 + 1)])
@pytest.mark.parametrize("said", ["option", "generation config", "model"])
def test_generate_refuses_more_new_tokens_than_the_model_has_positions_for(tiny, family, room, said):
    model = tiny.model(family)
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, local_tokens=8)) as handle:
        options = {"max_new_tokens": room + 1}
        if said == "generation config":
            options = {"generation_config": GenerationConfig(**options)}
        elif said == "model":
            model.generation_config.max_new_tokens, options = room + 1, {}
        with pytest.raises(ValueError, match=f"`max_new_tokens` is {room + 1} after"):
            handle.generate(tiny.ids(1, LENGTH), **options)


def test_positions_that_grow_as_needed_limit_no_answer(tiny):
    with unlimiform(tiny.model("m2m_100"), UnlimiformerConfig(window=WINDOW)) as handle:
        assert handle.generate(tiny.ids(1, LENGTH), max_new_tokens=70, min_new_tokens=70).shape == (1, 71)


def test_the_room_of_a_model_with_scaled_rotary_positions_is_not_limited(tiny):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with unlimiform(tiny.model("llama", rope_parameters=rope), UnlimiformerConfig(window=WINDOW)) as handle:
        inputs = handle.remember(tiny.ids(1, LENGTH)).inputs(tiny.ids(1, 150))
    assert inputs["attention_mask"].shape == (1, WINDOW + 150)


def test_a_memory_is_read_in_another_process_that_only_loads(tiny, tmp_path):
    model, memory = remember(tiny, "bart hidden")
    model.save_pretrained(tmp_path / "model")
    memory.save_pretrained(tmp_path / "book")
    asked = tiny.ids(3, 5, seed=9).tolist()
    script = f"""
import torch
from transformers import BartForConditionalGeneration
from graft import Memory, unlimiform
torch.set_num_threads(1)
model = BartForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r})
memory = Memory.from_pretrained({str(tmp_path / "book")!r}, model)
with torch.no_grad(), unlimiform(model, memory.config):
    torch.save(model(**memory.inputs(), decoder_input_ids=torch.tensor({asked})).logits, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model, memory, tiny))
