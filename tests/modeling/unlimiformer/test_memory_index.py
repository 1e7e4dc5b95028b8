"""A memory read through an index: exact where that finds all, measured where it does not, kept with the memory."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig, UnlimiformerLlamaConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.long_prompts import ReadsLongPrompts
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.memory_files import INDEX_FOLDER
from graft.modeling.unlimiformer.memory_size import estimate_memory
from graft.modeling.unlimiformer.modeling_unlimiformer_bart import UnlimiformerBart
from graft.modeling.unlimiformer.modeling_unlimiformer_llama import UnlimiformerLlamaForCausalLM
from graft.modeling.unlimiformer.report import AttentionReport
from graft.modeling.unlimiformer.training_regimes import training_with_memory

pytest.importorskip("faiss", reason="the extra graft-transformers[faiss] is not installed")

WINDOW = 16
LENGTHS = (120, 4, 100)
LISTS = {"nlist": 2, "nprobe": 1}
FREE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
RULES = {
    "bart hidden": ("bart", {"store": "hidden"}),
    "bart keys": ("bart", {"store": "keys_values"}),
    "bart windows": ("bart", {"heads": [1, 2], "first_layer": 1, "first_step": "window"}),
    "bart excluded": ("bart", {"exclude_window": True}),
    "t5 hidden": ("t5", {"store": "hidden"}),
    "t5gemma grouped, capped": ("t5gemma", {"store": "hidden"}),
    "t5gemma grouped keys": ("t5gemma", {"store": "keys_values"}),
    "led swapped": ("led", {}),
    "fsmt swapped": ("fsmt", {"store": "keys_values"}),
    "llama": ("llama", {}),
    "llama sinks, heads": ("llama", {"sinks": 2, "heads": [0, 3], "exclude_window": True}),
    "llama upper layers, origin": ("llama", {"first_layer": 1, "positions": "origin"}),
    "gemma2 capped, sliding": ("gemma2", {}),
    "gpt_oss sink logits": ("gpt_oss", {}),
    "cohere neighbours": ("cohere", {}),
    "gpt2 table": ("gpt2", {}),
}
FEW_RULES = ["bart hidden", "bart keys", "llama"]


def attached(tiny, rule, **options):
    """A model in float64, so that a choice of keys never hangs on rounding, and its attachment."""
    family, of_rule = RULES[rule]
    model = tiny.model(family, dtype=torch.float64)
    return model, unlimiform(
        model, UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, **of_rule, **options})
    )


def documents(tiny, side="left"):
    return tiny.pad([tiny.ids(n, seed=n) for n in LENGTHS], side)


@torch.no_grad()
def logits(model, memory, tiny, record=None):
    asked = tiny.ids(len(memory), 5, seed=9)
    if model.config.is_encoder_decoder:
        return model(**memory.inputs(record=record), decoder_input_ids=asked).logits
    return model(**memory.inputs(asked, record=record)).logits


def finding_all(handle, memory):
    """An index whose candidates are many enough to hold, in spite of float32, the best keys."""
    return handle.indexed(memory, "flat", index_refine=4)


# Equal to exact search where all is found


@pytest.mark.parametrize("rule", RULES)
def test_an_index_that_finds_all_gives_the_logits_of_exact_search(tiny, rule):
    """Of a batch of documents of different lengths, one of them shorter than a window, padded on the left."""
    model, handle = attached(tiny, rule)
    memory = handle.remember(*documents(tiny))
    indexed = finding_all(handle, memory)
    assert indexed.recall == 1
    assert set(indexed.indexes) == ({"hidden"} if memory.hidden is not None else {f"keys.{i}" for i in memory.keys})
    torch.testing.assert_close(logits(model, indexed, tiny), logits(model, memory, tiny), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", ["ivf_flat", "scalar", "hnsw", pytest.param("ivf_pq", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", FEW_RULES)
def test_every_kind_that_offers_all_keys_is_exact_whatever_it_ranks_by(tiny, rule, index):
    model, handle = attached(tiny, rule, exclude_window=True)
    rows = [tiny.ids(n, seed=n) for n in (300, 4)] if index == "ivf_pq" else [tiny.ids(n, seed=n) for n in LENGTHS]
    memory = handle.remember(*tiny.pad(rows, "left"))
    parameters = {
        "ivf_flat": {"nlist": 2, "nprobe": 2},
        "ivf_pq": {"nlist": 2, "nprobe": 2, "code_size": 4},
        "hnsw": {"ef_search": 400, "ef_construction": 400, "neighbours": 64},
        "scalar": None,
    }
    indexed = handle.indexed(memory, index, parameters[index], index_refine=80)
    torch.testing.assert_close(logits(model, indexed, tiny), logits(model, memory, tiny), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 1}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("rule", FEW_RULES)
def test_it_generates_what_exact_search_generates(tiny, rule, mode):
    model, handle = attached(tiny, rule)
    memory = handle.remember(*documents(tiny)).select([2, 0, 2])
    asked = () if model.config.is_encoder_decoder else tiny.pad([tiny.ids(n, seed=n) for n in (4, 2, 3)], "left")
    answers = []
    for each in (memory, finding_all(handle, memory)):
        torch.manual_seed(5)
        answers.append(model.generate(**each.inputs(*asked), **{**FREE, **mode}))
    assert torch.equal(*answers)


@pytest.mark.parametrize("rule", FEW_RULES)
def test_two_threads_read_one_index(tiny, rule):
    model, handle = attached(tiny, rule, index="ivf_flat", index_parameters=LISTS)
    memory = handle.remember(*documents(tiny))
    expected = logits(model, memory, tiny)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: torch.equal(logits(model, memory, tiny), expected), range(8)))


# What an index misses


def test_recall_is_a_naive_count_over_the_queries_of_the_heads_that_read(tiny):
    """One layer, so that its queries depend on no memory; the best keys are counted one by one in float64."""
    model = tiny.model("llama", dtype=torch.float64, num_hidden_layers=1)
    config = UnlimiformerConfig(window=WINDOW, keys_per_query=4, heads=[0, 1, 3])
    asked, seen = tiny.ids(1, 6, seed=3), {}
    with unlimiform(model, config) as handle:
        memory = handle.indexed(handle.remember(tiny.ids(1, 150)), "ivf_flat", LISTS)
        report = AttentionReport()
        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(query=out))
        inputs = memory.inputs(asked, record=report)
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        query = seen["query"].view(6, 4, 8)
        places = torch.arange(6) + WINDOW
        cosine, sine = model.model.rotary_emb(query, places[None])
        turned = query * cosine[0, :, None] + torch.cat([-query[..., 4:], query[..., :4]], -1) * sine[0, :, None]
    hits = []
    for head in config.heads:
        keys = memory.keys[0][0, head // 2]
        for row in turned[:, head]:
            best = (keys @ row).argsort(descending=True)[:4].tolist()
            [[offered]] = memory.indexes["keys.0"].search(row.expand(1, 2, 1, 8), 4)[:, head // 2].tolist()
            hits.append(len(set(best) & set(offered)) / 4)
    assert 0.3 < sum(hits) / len(hits) < 1
    assert abs(report.recall - sum(hits) / len(hits)) < 1e-6


@pytest.mark.parametrize("rule", FEW_RULES)
def test_few_lists_miss_keys_and_the_memory_says_how_many(tiny, rule):
    model, handle = attached(tiny, rule)
    memory = handle.remember(*documents(tiny))
    indexed = handle.indexed(memory, "ivf_flat", LISTS)
    assert 0.3 < indexed.recall < 1
    assert repr(indexed).endswith(f"keys 4 of 120, index ivf_flat, recall {indexed.recall:.2f})")
    assert repr(memory).endswith("keys 4 of 120)")
    assert repr(handle.indexed(indexed, "exact")) == repr(memory)
    assert not torch.allclose(logits(model, indexed, tiny), logits(model, memory, tiny), atol=1e-3)
    report, exact = AttentionReport(), AttentionReport()
    logits(model, indexed, tiny, report)
    logits(model, memory, tiny, exact)
    assert report.recall < 1
    assert exact.recall == 1


def test_the_memory_holds_the_recall_of_stretches_of_its_documents(tiny):
    model, handle = attached(tiny, "llama")
    memory = handle.indexed(handle.remember(*documents(tiny)), "ivf_flat", LISTS)
    report = AttentionReport()
    for probe in range(4):  # 4 tokens of each document, which is all of the shortest
        starts = [int((probe + 0.5) * (n - 4) / 4) for n in LENGTHS]
        asked = torch.stack([memory.input_ids[d, s : s + 4] for d, s in enumerate(starts)])
        with torch.no_grad():
            model(**memory.inputs(asked, record=report))
    assert memory.recall == report.recall


@pytest.fixture(scope="module")
def wide(tiny):
    """A memory of 2,600 tokens in 64 lists that shall find 0.995 of its keys, in as many lists as it takes."""
    options = {"index": "ivf_flat", "index_parameters": {"nlist": 64}, "index_refine": 4}
    model, handle = attached(tiny, "llama", **options, index_recall=0.995)
    memory = handle.remember(tiny.ids(1, 2600))
    yield model, handle, memory
    handle.remove()


def probes(memory):
    return {store.parameters["nprobe"] for index in memory.indexes.values() for store in index.stores[0]}


def test_search_is_widened_until_it_finds_what_is_wanted_and_no_further(wide):
    _, handle, memory = wide
    (chosen,) = probes(memory)
    assert chosen > 16
    assert memory.recall >= 0.995
    narrower = handle.indexed(memory, "ivf_flat", {"nlist": 64, "nprobe": chosen // 2}, index_refine=4)
    assert probes(narrower) == {chosen // 2}
    assert narrower.recall < 0.995
    by_default = handle.indexed(memory, "ivf_flat", {"nlist": 64}, index_refine=4)
    assert probes(by_default) == {16}
    assert by_default.recall >= 0.95


def test_a_widened_search_stays_so_saved_and_in_another_dtype(wide, tmp_path):
    model, _, memory = wide
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "book"), model)
    assert probes(loaded) == probes(memory) == probes(memory.to(dtype=torch.bfloat16))
    assert loaded.recall == memory.recall


@pytest.mark.slow
def test_an_index_that_cannot_find_enough_warns_and_is_kept(wide, caplog):
    _, handle, memory = wide
    coarse = handle.indexed(memory, "ivf_pq", {"nlist": 32, "code_size": 1}, index_refine=1)
    assert coarse.recall < 0.95
    assert probes(coarse) == {32}
    assert f"finds {coarse.recall:.3f} of the best keys, not the 0.950 wanted" in caplog.text


def test_a_report_of_an_index_changes_no_logit(tiny):
    model, handle = attached(tiny, "llama", index="ivf_flat", index_parameters=LISTS)
    memory = handle.remember(*documents(tiny))
    assert torch.equal(logits(model, memory, tiny, AttentionReport()), logits(model, memory, tiny))


def test_a_batch_is_each_document_alone(tiny):
    model, handle = attached(tiny, "llama", index="ivf_flat", index_parameters=LISTS)
    memory = handle.remember(*documents(tiny))
    together = logits(model, memory, tiny)
    asked = tiny.ids(3, 5, seed=9)
    for row, length in enumerate(LENGTHS):
        alone = handle.remember(tiny.ids(1, length, seed=length))
        assert (alone.indexes == {}) == (memory.indexes["keys.0"].stores[row] == []) == (length == 4)
        with torch.no_grad():
            found = model(**alone.inputs(asked[row : row + 1])).logits
            torch.testing.assert_close(together[row], found[0], rtol=1e-9, atol=1e-9)


def test_where_all_keys_are_kept_there_is_no_index(tiny):
    model, handle = attached(tiny, "bart keys", index="ivf_flat", keys_per_query=200)
    memory = handle.remember(*documents(tiny))
    assert memory.indexes == {}
    assert memory.index_nbytes == 0
    assert repr(memory).endswith("exact)")
    assert "keys 200 of n, index ivf_flat" in repr(handle)
    assert logits(model, memory, tiny).isfinite().all()


# With the memory


@pytest.mark.parametrize("rule", FEW_RULES)
def test_a_saved_index_is_loaded_with_the_memory_bit_for_bit(tiny, tmp_path, rule):
    model, handle = attached(tiny, rule, index="ivf_flat", index_parameters=LISTS)
    memory = handle.remember(*documents(tiny))
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "book"), model)
    assert torch.equal(logits(model, loaded, tiny), logits(model, memory, tiny))
    assert repr(loaded) == repr(memory)
    assert (loaded.recall, loaded.index_nbytes) == (memory.recall, memory.index_nbytes)


@pytest.mark.parametrize("damage", ["missing", "changed", "of other keys"])
def test_a_damaged_index_is_named(tiny, tmp_path, damage):
    model, handle = attached(tiny, "llama", index="flat")
    memory = handle.remember(*documents(tiny))
    folder = memory.save_pretrained(tmp_path / "book")
    path = folder / INDEX_FOLDER / "keys.1" / "2-0" / "index.faiss"
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        other = handle.remember(tiny.ids(1, 80))
        other.indexes["keys.1"].stores[0][0].save(path.parent, replace=True)
    named = "2-0" if damage == "of other keys" else "index.faiss"
    with pytest.raises(ValueError, match=named):
        Memory.from_pretrained(folder, model, verify=damage != "of other keys")


@pytest.mark.parametrize("rule", FEW_RULES)
def test_appending_gives_the_index_of_the_whole(tiny, rule):
    model, handle = attached(tiny, rule, index="flat", index_refine=4)
    ids, mask = documents(tiny, "right")
    whole = handle.remember(ids, mask)
    more = [tiny.ids(n, seed=n)[n // 2 :] for n in LENGTHS]
    first = handle.remember(*tiny.pad([tiny.ids(n, seed=n)[: n // 2] for n in LENGTHS], "right"))
    grown = handle.append(first, *tiny.pad(more, "left"))
    name = next(iter(whole.indexes))
    assert [[len(store) for store in of] for of in grown.indexes[name].stores] == [
        [len(store) for store in of] for of in whole.indexes[name].stores
    ]
    assert grown.recall == 1
    torch.testing.assert_close(logits(model, grown, tiny), logits(model, whole, tiny), rtol=1e-8, atol=1e-8)


def test_an_index_goes_along_where_vectors_stay_and_is_built_anew_where_they_change(tiny):
    model, handle = attached(tiny, "llama", index="ivf_flat", index_parameters=LISTS)
    memory = handle.remember(*documents(tiny))
    assert memory.to("cpu").indexes is memory.indexes
    assert memory.select([1, 0, 0, 2]).indexes is memory.indexes
    last = memory.select([2, 2])
    assert last.indexes["keys.0"].stores == memory.indexes["keys.0"].stores[2:]
    expected = logits(model, handle.indexed(last, "ivf_flat", LISTS), tiny)
    assert torch.equal(logits(model, last, tiny), expected)
    half = memory.to(dtype=torch.bfloat16)
    assert set(half.indexes) == set(memory.indexes)
    assert half.recall is None
    stored = half.indexes["keys.1"].stores[0][1].reconstruct(torch.arange(4).numpy())
    assert torch.equal(stored, half.keys[1][0, 1, :4].float())
    assert memory.with_tensors(memory.tensors()).indexes == {}


def test_calibrated_memories_are_indexed_again(tiny):
    _, handle = attached(tiny, "llama", index="flat", local_tokens=8)
    memory = handle.remember(tiny.ids(1, 120))
    found = handle.calibrate(memory, candidates=[memory.config], tokens=20, margin=-100.0)
    assert set(found.memory.indexes) == set(memory.indexes)
    assert found.memory.recall == memory.recall


@pytest.mark.parametrize("rule", ["bart hidden", "bart keys", "llama", "t5gemma grouped keys"])
@pytest.mark.parametrize("index", ["flat", "ivf_flat", "hnsw", "scalar"])
def test_the_estimate_knows_the_bytes_of_indexes(tiny, rule, index):
    model, handle = attached(tiny, rule, index=index)
    memory = handle.remember(*documents(tiny))
    size = handle.estimate(LENGTHS)
    assert size.index_nbytes == memory.index_nbytes > 0
    assert size.nbytes == memory.nbytes
    if rule != "bart hidden":
        given = replace(handle.config, store="keys_values")
        assert estimate_memory(model.config, LENGTHS, given, torch.float64) == size
    assert "MB of indexes" in str(size)
    handle.remove()
    budget = size.nbytes + size.index_nbytes - 1
    with (
        unlimiform(model, replace(handle.config, max_bytes=budget)) as tight,
        pytest.raises(ValueError, match="`max_bytes`.*`index`"),
    ):
        tight.remember(*documents(tiny))


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_permanent_models_remember_with_an_index(tiny, family):
    ours = UnlimiformerBart if family == "bart" else UnlimiformerLlamaForCausalLM
    config = UnlimiformerConfig(window=WINDOW, keys_per_query=4, local_tokens=5)
    _, model = tiny.permanent(family, ours, config, dtype=torch.float64)
    _, indexed = tiny.permanent(family, ours, replace(config, index="flat", index_refine=4), dtype=torch.float64)
    ids = tiny.ids(2, 120)
    assert indexed.remember(ids).recall == 1
    assert torch.equal(indexed.generate(ids, **FREE), model.generate(ids, **FREE))


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_training_searches_exactly(tiny, family):
    model, losses = tiny.model(family, dtype=torch.float64), []
    labels = tiny.ids(1, 6, seed=1)
    batch = {"input_ids": tiny.ids(1, 100), "labels": labels}
    if family == "llama":
        batch = {"memory_ids": batch["input_ids"], "input_ids": labels, "labels": labels}
    for options in ({}, {"index": "ivf_flat", "index_parameters": LISTS}):
        config = UnlimiformerConfig(window=WINDOW, keys_per_query=4, training="retrieval", **options)
        with training_with_memory(model, config, batch, 0) as inputs:
            losses.append(model(**inputs).loss)
    assert torch.equal(*losses)


# Refused


def test_without_faiss_the_extra_is_named_when_attaching(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    model = tiny.model("llama")
    with pytest.raises(ImportError, match=r"`index` 'hnsw': .*pip install graft-transformers\[faiss\]"):
        unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4, index="hnsw"))
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        memory = handle.remember(tiny.ids(1, 50))
        with pytest.raises(ImportError, match=r"`index` 'flat': .*pip install graft-transformers\[faiss\]"):
            handle.indexed(memory, "flat")


def test_without_faiss_a_memory_with_an_index_does_not_load(tiny, tmp_path, monkeypatch):
    model, handle = attached(tiny, "llama", index="flat")
    folder = handle.remember(tiny.ids(1, 50)).save_pretrained(tmp_path / "book")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"`index` 'flat': .*pip install graft-transformers\[faiss\]"):
        Memory.from_pretrained(folder, model)


REFUSED = {
    "unknown parameter": ("ivf_flat", {"lists": 3}, r"`index_parameters`: .*\['nlist', 'nprobe'\].*\['lists'\]"),
    "parameter of another": ("hnsw", {"nprobe": 3}, r"`index_parameters`: .*'ef_search'.*\['nprobe'\]"),
    "too many lists": (
        "ivf_flat",
        {"nlist": 5},
        r"`index` 'ivf_flat' does not fit the 120 keys of document 0: `nlist` 5 needs",
    ),
    "too few keys for codes": ("ivf_pq", {"code_size": 4}, r"'ivf_pq' does not fit the 120 keys.*at least 256 .* 120"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_read(tiny, case):
    index, parameters, said = REFUSED[case]
    model, read = tiny.model("llama"), []
    hook = model.model.register_forward_pre_hook(lambda *_: read.append(1))
    config = UnlimiformerConfig(window=WINDOW, keys_per_query=4, index=index, index_parameters=parameters)
    with pytest.raises(ValueError, match=said):
        unlimiform(model, config).remember(*documents(tiny))
    hook.remove()
    assert read == []


def test_codes_that_do_not_divide_a_head_are_refused_before_anything_is_read(tiny):
    _, handle = attached(tiny, "llama", index="ivf_pq", index_parameters={"code_size": 5})
    with pytest.raises(ValueError, match="document 0: `code_size` must divide the dimension 8, got 5"):
        handle.remember(tiny.ids(1, 300))


def test_a_document_too_short_for_lists_is_named(tiny):
    _, handle = attached(tiny, "llama", index="ivf_flat")
    rows = [tiny.ids(120), tiny.ids(4), tiny.ids(38)]  # the second keeps all its keys and needs no index
    with pytest.raises(ValueError, match=r"the 38 keys of document 2: .*at least 39 vectors, got 38"):
        handle.remember(*tiny.pad(rows, "right"))
    assert handle.remember(*tiny.pad(rows[:2], "right")).indexes["keys.0"].stores[1] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"index": "hnsw", "keys_per_query": None}, "`keys_per_query` None keeps all"),
        ({"index_parameters": {"nprobe": 3}}, '`index_parameters` is of an index, and `index` is "exact"'),
        ({"index_refine": 2}, '`index_refine` is of an index, and `index` is "exact"'),
        ({"index": "ivf_flat", "index_parameters": {"nprobe": 0}}, "`index_parameters` must be at least 1, got 0"),
        ({"index": "ivf_flat", "index_refine": 0}, "`index_refine` must be at least 1, got 0"),
        ({"index": "annoy"}, "index"),
        ({"index_recall": 0.9}, '`index_recall` is of an index, and `index` is "exact"'),
        ({"index": "hnsw", "index_recall": 1.5}, r"`index_recall` must lie in \(0, 1\], got 1.5"),
        ({"index": "flat", "index_recall": 0.9}, "`index_recall` is of ivf_flat, ivf_pq, hnsw, and `index` is 'flat'"),
        (
            {"index": "hnsw", "index_recall": 0.9, "index_parameters": {"ef_search": 8}},
            "`index_recall` 0.9 chooses 'ef_search', and `index_parameters` gives it",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        UnlimiformerConfig(**options)


def test_a_model_config_keeps_the_options_of_an_index(tmp_path):
    options = UnlimiformerConfig(index="ivf_flat", index_parameters={"nprobe": 8}, index_refine=2)
    config = UnlimiformerLlamaConfig(unlimiformer_config=options)
    config.save_pretrained(tmp_path)
    assert UnlimiformerLlamaConfig.from_pretrained(tmp_path).unlimiformer_config == options
    assert issubclass(UnlimiformerLlamaForCausalLM, ReadsLongPrompts)
