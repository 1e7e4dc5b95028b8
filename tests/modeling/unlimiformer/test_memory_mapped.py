"""A saved memory is read from its file in place: nothing is copied when it loads, and no half of it is ever there."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer import memory_files
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory

TENSORS_FILE = "memory.safetensors"
needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def remembered(tiny, family, count=1, length=300, **options):
    model = tiny.model(family)
    handle = unlimiform(model, UnlimiformerConfig(window=16, keys_per_query=4, **options))
    return model, handle, handle.remember(tiny.ids(count, length, seed=1))


def mappings(path):
    """(first address, end, resident kB) of each mapping of a file in this process."""
    found = []
    with open("/proc/self/smaps") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, end = (int(word, 16) for word in words[0].split("-"))
                is_ours = line.rstrip().endswith(str(path))
            elif words[0] == "Rss:" and is_ours:
                found.append((start, end, int(words[1])))
    return found


def lies_in(tensor, places):
    return any(start <= tensor.data_ptr() < end for start, end, _ in places)


@needs_maps
@pytest.mark.parametrize(("family", "options"), [("bart", {}), ("bart", {"heads": [1]}), ("llama", {})])
def test_a_loaded_memory_lies_in_its_file_before_and_after_it_is_read(tiny, tmp_path, family, options):
    model, _, memory = remembered(tiny, family, **options)
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "memory"), model)
    places = mappings(tmp_path / "memory" / TENSORS_FILE)
    assert all(lies_in(tensor, places) for tensor in loaded.tensors().values())
    many = loaded.select([0] * 5)
    model.generate(**many.inputs(tiny.ids(5, 3)), max_new_tokens=3, do_sample=False)
    assert all(lies_in(tensor, places) for tensor in many.tensors().values())


@needs_maps
def test_loading_without_checksums_pages_nothing_in(tiny, tmp_path):
    model, _, memory = remembered(tiny, "bart", count=40, length=500, memory_dtype="float32")
    memory.save_pretrained(tmp_path / "memory")
    loaded = Memory.from_pretrained(tmp_path / "memory", model, verify=False)
    resident = sum(kilobytes for _, _, kilobytes in mappings(tmp_path / "memory" / TENSORS_FILE))
    assert 1024 * resident < memory.nbytes / 4
    assert torch.equal(loaded.hidden, memory.hidden)


def test_a_loaded_memory_never_writes_to_its_file(tiny, tmp_path):
    model, handle, memory = remembered(tiny, "llama")
    file = memory.save_pretrained(tmp_path / "memory") / TENSORS_FILE
    before = file.read_bytes()
    loaded = Memory.from_pretrained(tmp_path / "memory", model)
    handle.append(loaded, tiny.ids(1, 20, seed=2))
    loaded.keys[0].zero_()
    assert file.read_bytes() == before


def test_a_file_of_tensors_that_the_manifest_does_not_list_is_not_read(tiny, tmp_path):
    model, _, memory = remembered(tiny, "llama")
    folder = memory.save_pretrained(tmp_path / "memory")
    save_file({name: tensor + 1 for name, tensor in memory.tensors().items()}, folder / "memory_of_others.safetensors")
    loaded = Memory.from_pretrained(folder, model).tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in memory.tensors().items())


def test_without_checksums_a_truncated_file_is_still_refused(tiny, tmp_path):
    model, _, memory = remembered(tiny, "llama")
    file = memory.save_pretrained(tmp_path / "memory") / TENSORS_FILE
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=TENSORS_FILE):
        Memory.from_pretrained(tmp_path / "memory", model, verify=False)


def test_a_save_that_fails_leaves_nothing_and_what_it_would_replace(tiny, tmp_path):
    model, _, memory = remembered(tiny, "llama")
    broken = memory.to("meta")  # has no numbers to write
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        broken.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    memory.save_pretrained(tmp_path / "old")
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        broken.save_pretrained(tmp_path / "old", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert torch.equal(Memory.from_pretrained(tmp_path / "old", model).keys[0], memory.keys[0])


def test_a_grown_memory_takes_the_place_of_the_one_it_is_mapped_from(tiny, tmp_path):
    model, handle, memory = remembered(tiny, "llama")
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "memory"), model)
    grown = handle.append(loaded, tiny.ids(1, 20, seed=2))
    with pytest.raises(FileExistsError):
        grown.save_pretrained(tmp_path / "memory")
    grown.save_pretrained(tmp_path / "memory", replace=True)
    again = Memory.from_pretrained(tmp_path / "memory", model)
    assert torch.equal(again.keys[1], grown.keys[1])
    assert torch.equal(loaded.keys[1], memory.keys[1])  # what is mapped already stays


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("bart", 1)])
def test_many_questions_at_once_are_answered_as_one_by_one(tiny, family, beams):
    """One stored document: no key is copied, nothing leaks from row to row."""
    model, _, memory = remembered(tiny, family)
    lengths = (1, 7, 3, 5, 2, 7) if family == "llama" else (4,) * 6  # BART itself counts padding as positions
    questions = [tiny.ids(length, seed=10 + i) for i, length in enumerate(lengths)]
    many = memory.select([0] * len(questions))
    assert all(many.tensors()[name].data_ptr() == tensor.data_ptr() for name, tensor in memory.tensors().items())
    assert many.nbytes == memory.nbytes
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    ids, mask = tiny.pad(questions, "left")
    answers = model.generate(**many.inputs(ids, mask), **options)[:, -4:]
    for answer, question in zip(answers, questions, strict=True):
        alone = model.generate(**memory.inputs(question[None]), **options)[0, -4:]
        assert torch.equal(answer, alone)


@needs_maps
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_large_memory_lies_in_several_files_each_of_which_is_checked(tiny, tmp_path, monkeypatch, damage):
    model, _, memory = remembered(tiny, "llama")
    largest = max(tensor.nbytes for tensor in memory.tensors().values())
    monkeypatch.setattr(memory_files, "FILE_BYTES", largest)
    folder = memory.save_pretrained(tmp_path / "memory")
    files = sorted(folder.glob("memory-*-of-*.safetensors"))
    assert len(files) >= 2
    assert not (folder / TENSORS_FILE).exists()
    assert all(file.stat().st_size < 2 * largest for file in files)

    loaded = Memory.from_pretrained(folder, model)
    places = [place for file in files for place in mappings(file)]
    for name, tensor in memory.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
        assert lies_in(loaded.tensors()[name], places)
    again = Memory.from_pretrained(loaded.save_pretrained(tmp_path / "again"), model)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in memory.tensors().items())

    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content) if damage == "changed" else files[-1].unlink()
    with pytest.raises(ValueError, match=files[-1].name):
        Memory.from_pretrained(folder, model)
