"""The reader behind graft-demo: reading in pieces equals reading at once, answers stream, what was read is told."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.document_reader import DocumentReader
from graft.trainer.tokenisation import plain_ids
from graft.trainer.tokenizer_training import train_tokenizer

OPTIONS = {"window": 16, "overlap": 0.25, "keys_per_query": 8}
DOCUMENT = "the cat sat on a mat near the sea while rain fell all night " * 40
CHAT = "{% for m in messages %}<|{{ m.content }}|>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.fixture(params=["plain", "chat"])
def folder(request, tmp_path):
    tokenizer = train_tokenizer([DOCUMENT], vocab_size=300, model_max_length=128)
    tokenizer.chat_template = CHAT if request.param == "chat" else None
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, num_key_value_heads=1, max_position_embeddings=128, **sizes, **tokens)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def expected_answer(folder, question):
    """One reading, one generation, by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, after, start = ("<|", "|>!", []) if tokenizer.chat_template else ("", "", [0])
    document, asked = plain_ids(tokenizer, [before + DOCUMENT, f"\n\n{question}{after}"])
    with unlimiform(AutoModelForCausalLM.from_pretrained(folder).eval(), UnlimiformerConfig(**OPTIONS)) as handle:
        memory = handle.remember(torch.tensor([[*start, *document]]))
        inputs = memory.inputs(torch.tensor([asked]))
        tokens = handle.model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=1)
    return memory, tokenizer.decode(tokens[0, len(asked) :], skip_special_tokens=True).strip()


def test_a_document_read_in_pieces_is_answered_from_as_if_read_at_once(folder):
    reader = DocumentReader(folder, OPTIONS, {"max_new_tokens": 7})
    readings = list(reader.read(DOCUMENT))
    told = [reading.tokens for reading in readings]
    assert len(told) > 3
    assert told == sorted(set(told))
    assert {reading.total for reading in readings} == {told[-1]}
    memory, text = expected_answer(folder, "who sat")
    assert torch.equal(readings[-1].memory.input_ids, memory.input_ids)
    replies = list(reader.ask(readings[-1].memory, "who sat"))
    assert replies[-1].text == text
    assert len(replies) > 2
    for reply, following in zip(replies, replies[1:-1], strict=False):
        assert following.text.startswith(reply.text)
        assert (reply.passages, reply.page) == ([], "")


def test_the_last_reply_shows_what_was_read_over_the_escaped_text(folder):
    reader = DocumentReader(folder, OPTIONS, {"max_new_tokens": 3})
    *_, reading = reader.read(DOCUMENT + "<script>alert(1)</script>")
    *_, reply = reader.ask(reading.memory, "who sat")
    assert reply.passages
    assert "The document" in reply.page
    assert "data:image/png" in reply.page
    assert "<script" not in reply.page


def test_a_question_leaves_the_memory_as_it_was(folder):
    reader = DocumentReader(folder, OPTIONS, {"max_new_tokens": 3})
    *_, reading = reader.read(DOCUMENT)
    first, _, again = ([r.text for r in reader.ask(reading.memory, q)] for q in ("who sat", "the rain", "who sat"))
    assert first == again


def test_who_stops_listening_stops_the_generation(folder):
    reader = DocumentReader(folder, OPTIONS, {"max_new_tokens": 60, "min_new_tokens": 60})
    *_, reading = reader.read("the cat sat on a mat")
    steps = []
    hook = reader.model.register_forward_hook(lambda *_: steps.append(1))
    replies = reader.ask(reading.memory, "who")
    next(replies)
    replies.close()
    hook.remove()
    assert len(steps) < 60


def test_an_error_in_the_thread_reaches_the_listener(folder):
    reader = DocumentReader(folder, OPTIONS)
    *_, reading = reader.read(DOCUMENT)

    def broken(*_):
        raise RuntimeError("out of memory")

    hook = reader.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(reader.ask(reading.memory, "who"))
    hook.remove()


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="max_new_tokenss"):
        DocumentReader(folder, OPTIONS, {"max_new_tokenss": 3})
    with pytest.raises(ConfigurationError, match="windoww"):
        DocumentReader(folder, {"windoww": 3})
    reader = DocumentReader(folder, {**OPTIONS, "max_bytes": 10})
    with pytest.raises(ValueError, match="`document` is empty"):
        list(reader.read(" \n"))
    with pytest.raises(ValueError, match="`max_bytes`"):
        list(reader.read(DOCUMENT))
    reader = DocumentReader(folder, OPTIONS)
    *_, reading = reader.read("the cat")
    with pytest.raises(ValueError, match="`question` is empty"):
        list(reader.ask(reading.memory, ""))
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=8, **sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="encoder-decoder"):
        DocumentReader(str(tmp_path))
