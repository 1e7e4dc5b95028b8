"""scripts/generate.py on tiny models: questions given, typed and piped; memories kept; sources; mistakes told."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.report import AttentionReport
from graft.modeling.unlimiformer.retrieval_heads import retrieval_heads
from graft.scripts.generate import main
from graft.trainer.conversation import Conversation, Request
from graft.trainer.generation import ANSWER_TOKENS, with_limit
from graft.trainer.named_texts import NamedText
from graft.trainer.tokenisation import plain_ids

OPTIONS = ["--max_new_tokens", "5", "--do_sample", "false", "--memory.window", "32", "--memory.keys_per_query", "8"]
CONFIG = UnlimiformerConfig(window=32, keys_per_query=8)
DOCUMENT = "the cat sat on a mat near the sea while rain fell all night " * 12


@pytest.fixture(autouse=True)
def stdin(monkeypatch):
    """A function that gives standard input its text, and says whether someone types it; empty unless it is called."""

    def give(text, typed=False):
        stream = io.StringIO(text)
        monkeypatch.setattr(stream, "isatty", lambda: typed, raising=False)
        monkeypatch.setattr("sys.stdin", stream)

    give("")
    return give


@pytest.fixture(params=["seq2seq", "causal"])
def model_folder(request, make_run, tmp_path):
    make_run(request.param)
    return request.param, str(tmp_path / "model")


def expected_text(task, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = plain_ids(tokenizer, ["Read: " + DOCUMENT, "\n\nWho sat?!", "Read: Who sat?\n\n", DOCUMENT + "!"])
    with torch.no_grad():
        if task == "seq2seq":
            model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
            with unlimiform(model, CONFIG) as handle:
                question = torch.tensor([[0, *ids[2]]])  # in front of every window
                inputs = handle.remember(torch.tensor([[*ids[3], 2]]), prefix_ids=question).inputs()
                tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            with unlimiform(model, CONFIG) as handle:
                inputs = handle.remember(torch.tensor([[0, *ids[0]]])).inputs(torch.tensor([ids[1]]))
                tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, len(ids[1]) :]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_document_is_remembered_and_the_question_kept_apart(model_folder, tmp_path, capsys):
    task, folder = model_folder
    (tmp_path / "book.txt").write_text(DOCUMENT)
    texts = ["--prompt", str(tmp_path / "book.txt"), "--prefix", "Read: ", "--question", "Who sat?", "--suffix", "!"]
    assert main([folder, *texts, *OPTIONS]) == 0
    assert capsys.readouterr().out.strip() == expected_text(task, folder)


def test_what_reading_costs_is_said_before_and_a_budget_is_kept(model_folder, capsys, caplog):
    task, folder = model_folder
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS]) == 0
    auto = AutoModelForSeq2SeqLM if task == "seq2seq" else AutoModelForCausalLM
    asked, whole = map(len, plain_ids(AutoTokenizer.from_pretrained(folder), ["Who?\n\n", DOCUMENT]))
    tokens, prefix = (whole + 1, asked + 1) if task == "seq2seq" else (whole + 1, 0)  # each with a special token
    with unlimiform(auto.from_pretrained(folder), CONFIG) as handle:
        size = handle.estimate(tokens, prefix)
    assert f"Remembering {tokens:,} tokens: {size}." in caplog.messages
    budget = ["--memory.max_bytes", str(size.nbytes - 1)]
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS, *budget]) == 2
    assert "`max_bytes`" in capsys.readouterr().err.splitlines()[-1]


def test_report_is_a_page_and_a_picture(model_folder, tmp_path, capsys):
    _, folder = model_folder
    page = tmp_path / "page.html"
    assert main([folder, "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS, "--report", str(page)]) == 0
    assert "The document" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "%]" in capsys.readouterr().err


def test_without_memory_the_stock_model_answers(model_folder, capsys):
    _, folder = model_folder
    assert main([folder, "--prompt", "the cat sat", "--no-memory", "--max_new_tokens", "3", "--num_beams", "2"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory.windoww", "3"], "no 'windoww'; there are .*window"),
        (["--memory.overlap", "2"], "overlap.*2"),
        (["--max_new_tokenss", "3"], "max_new_tokenss"),
        (["--max_new_tokens", "three"], "wrong type in .*'max_new_tokens': 'three'"),
        (["--no-memory", "--report", "page.html"], "--report.*--no-memory"),
        (["--chat"], "chat template"),
        (["--no-memory"], "positions: use the memory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(make_run, tmp_path, capsys, options, message):
    make_run("causal")
    assert main([str(tmp_path / "model"), "--prompt", DOCUMENT, *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("graft-generate: ")
    assert re.search(message, last), last


def test_a_model_that_is_not_there_is_named(capsys):
    assert main(["nowhere/at-all", "--prompt", "x"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err


SOURCE = re.compile(r"^\[(.+), tokens ([\d,]+)-([\d,]+), [\d.]+ %\] '(.*)'$", re.MULTILINE)
OTHER = "nobody came home to the old house where a dog slept under the table " * 12


@pytest.fixture
def library(tmp_path):
    """A folder with two documents, a file that is no text, and one deeper down."""
    folder = tmp_path / "library"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text(DOCUMENT)
    (folder / "more" / "b.md").write_text(OTHER)
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return folder


def test_documents_of_a_folder_are_read_one_behind_the_other_and_sources_lie_where_they_are_said_to(
    make_run, tmp_path, library, capsys
):
    make_run("causal")
    folder = str(tmp_path / "model")
    assert (
        main(
            [
                folder,
                "--prompt",
                str(library),
                "--question",
                "Who?",
                *OPTIONS,
                "--sources",
                "40",
                "--source-heads",
                "0",
            ]
        )
        == 0
    )
    found, errors = capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second, question = plain_ids(tokenizer, [DOCUMENT, "\n\n" + OTHER, "\n\nWho?"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with unlimiform(model, CONFIG) as handle:
        inputs = handle.remember(torch.tensor([[0, *first, *second]])).inputs(torch.tensor([question]))
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, len(question) :]
    assert found.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    documents = {str(library / "a.txt"): first, str(library / "more" / "b.md"): second}
    sources = SOURCE.findall(errors)
    assert {name for name, *_ in sources} == set(documents)
    for name, start, end, text in sources:
        expected = tokenizer.decode(documents[name][int(start.replace(",", "")) : int(end.replace(",", ""))])
        assert text == repr(expected)[1:-1]


@pytest.mark.parametrize("count", [1, 3])
def test_sources_are_what_the_heads_that_find_read_for_question_and_answer(make_run, tmp_path, count):
    make_run("causal")
    options = {"memory": {"window": 32, "keys_per_query": 8}, "generation": {"max_new_tokens": 5, "do_sample": False}}
    with Conversation(Request(str(tmp_path / "model"), sources=4, source_heads=count, **options)) as conversation:
        conversation.give([NamedText("book", DOCUMENT)])
        answers = [conversation.ask(question) for question in ("Who?", "Where?")]
        read, tokenizer = conversation._all_read(), conversation.tokenizer
        heads = retrieval_heads(conversation.model, read.memory, count)
        assert conversation._heads == heads  # told apart once, for all questions
        report = AttentionReport()
        asked = torch.tensor(plain_ids(tokenizer, ["\n\nWhere?"]))
        conversation.model.generate(**read.memory.inputs(asked, record=report), **options["generation"])
        expected = report.passages(tokenizer, count=4, heads=heads)
    assert [source.share for source in answers[1].sources] == pytest.approx([passage.share for passage in expected])
    begin = read.places[0].start
    assert [source.end for source in answers[1].sources] == [passage.end - begin for passage in expected]


def test_a_document_too_short_to_tell_heads_apart_is_quoted_as_all_heads_read_it(make_run, tmp_path, capsys):
    make_run("causal")
    sources = []
    for heads in ("2", "0"):
        options = ["--prompt", DOCUMENT[:200], "--question", "Who?", *OPTIONS, "--source-heads", heads]
        assert main([str(tmp_path / "model"), *options]) == 0
        sources.append(SOURCE.findall(capsys.readouterr().err))
    assert sources[0] == sources[1] != []


def test_sources_of_an_encoder_decoder_lie_where_they_are_said_to(make_run, tmp_path, library, capsys):
    make_run("seq2seq")
    folder = str(tmp_path / "model")
    assert main([folder, "--prompt", str(library), "--question", "Who?", *OPTIONS, "--sources", "40"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = dict(zip(["a.txt", "b.md"], plain_ids(tokenizer, [DOCUMENT, "\n\n" + OTHER]), strict=True))
    sources = SOURCE.findall(capsys.readouterr().err)
    assert sources
    for name, start, end, text in sources:
        expected = tokenizer.decode(ids[Path(name).name][int(start.replace(",", "")) : int(end.replace(",", ""))])
        assert text == repr(expected)[1:-1]


def test_a_kept_memory_answers_as_the_documents_did_and_other_weights_are_refused(make_run, tmp_path, library, capsys):
    make_run("causal")
    folder, kept = str(tmp_path / "model"), str(tmp_path / "kept")
    asked = ["--question", "Who?", "Where did it sleep?", "--max_new_tokens", "5", "--do_sample", "false"]
    texts = ["--prompt", str(library), "--suffix", " Answer:"]
    assert main([folder, *texts, *OPTIONS, *asked, "--save-memory", kept]) == 0
    first = capsys.readouterr()
    assert main([folder, "--load-memory", kept, *asked]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert len(SOURCE.findall(first.err)) == 6
    assert SOURCE.findall(second.err) == SOURCE.findall(first.err)
    assert "reading" not in second.err
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(folder)
    assert main([folder, "--load-memory", kept, *asked]) == 2
    assert "was made by weights" in capsys.readouterr().err.splitlines()[-1]


def test_a_kept_memory_of_an_encoder_decoder_answers_without_a_question_only(make_run, tmp_path, capsys):
    make_run("seq2seq")
    folder, kept = str(tmp_path / "model"), str(tmp_path / "kept")
    assert main([folder, "--prompt", DOCUMENT, *OPTIONS, "--save-memory", kept]) == 0
    first = capsys.readouterr().out
    loaded = [folder, "--load-memory", kept, "--max_new_tokens", "5", "--do_sample", "false"]
    assert main(loaded) == 0
    assert capsys.readouterr().out == first
    assert main([*loaded, "--question", "Who?"]) == 2
    assert "does not hold the documents" in capsys.readouterr().err


def test_lines_of_standard_input_are_questions_and_each_has_its_page(make_run, tmp_path, capsys, stdin):
    make_run("causal")
    folder, page = str(tmp_path / "model"), tmp_path / "page.html"
    assert main([folder, "--prompt", DOCUMENT, *OPTIONS, "--question", "Who?", "Where?"]) == 0
    expected = capsys.readouterr().out
    stdin("Who?\n\n  Where?\n")
    assert main([folder, "--prompt", DOCUMENT, *OPTIONS, "--report", str(page)]) == 0
    assert capsys.readouterr().out == expected
    assert page.is_file()
    assert page.with_name("page-2.html").is_file()


def test_questions_are_typed_until_an_empty_one_and_one_that_is_too_long_does_not_end_it(
    make_run, tmp_path, capsys, stdin
):
    make_run("causal")
    folder = str(tmp_path / "model")
    stdin(f"Who?\n{'far too long ' * 60}\nWhere?\n\nnever asked\n", typed=True)
    assert main([folder, "--prompt", DOCUMENT, *OPTIONS, "--sources", "0"]) == 0
    out, errors = capsys.readouterr()
    assert errors.count("Question (") == 4
    assert errors.count("graft-generate: `question_ids` has") == 1
    assert main([folder, "--prompt", DOCUMENT, *OPTIONS, "--question", "Who?", "Where?"]) == 0
    assert capsys.readouterr().out == out


def test_ctrl_c_stops_an_answer_but_no_conversation_that_is_typed(make_run, tmp_path, capsys, stdin, monkeypatch):
    make_run("causal")
    answers = Conversation.ask

    def ask(self, question, page):
        if question == "Who?":
            raise KeyboardInterrupt
        return answers(self, question, page)

    monkeypatch.setattr(Conversation, "ask", ask)
    command = [str(tmp_path / "model"), "--prompt", DOCUMENT, *OPTIONS]
    stdin("Who?\nWhere?\n\n", typed=True)
    assert main(command) == 0
    assert "graft-generate: the answer was interrupted." in capsys.readouterr().err
    stdin("Who?\nWhere?\n")
    assert main(command) == 130


@pytest.mark.parametrize(("positions", "limit"), [(None, ANSWER_TOKENS), (4096, ANSWER_TOKENS), (128, 32)])
def test_an_answer_has_a_limit_that_the_models_own_comes_before(positions, limit):
    config = PreTrainedConfig() if positions is None else PreTrainedConfig(max_position_embeddings=positions)

    def limited(options, **own):
        return with_limit(options, SimpleNamespace(config=config, generation_config=GenerationConfig(**own)))

    assert limited({}) == {"max_new_tokens": limit}
    assert limited({"do_sample": False}) == {"max_new_tokens": limit, "do_sample": False}
    assert limited({"max_length": 7}) == {"max_length": 7}
    assert limited({}, max_length=142) == limited({}, max_new_tokens=9) == {}


def test_an_answer_without_a_limit_is_no_stump(make_run, tmp_path, capsys):
    make_run("causal")
    command = [str(tmp_path / "model"), "--prompt", DOCUMENT, "--question", "Who?", *OPTIONS[2:]]
    command += ["--min_new_tokens", "30"]
    answers = []
    for limit in ([], ["--max_new_tokens", "32"]):  # a quarter of the model's positions
        assert main([*command, *limit]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_memory_is_kept_without_any_question(make_run, tmp_path, capsys):
    make_run("causal")
    kept = tmp_path / "kept"
    assert main([str(tmp_path / "model"), "--prompt", DOCUMENT, *OPTIONS, "--save-memory", str(kept)]) == 0
    assert (kept / "documents.json").is_file()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "bok.txt"], "'bok.txt' is no file"),
        (["--prompt", "a text", "--max_tokens", "8"], "`GenerationConfig` has no max_tokens; did you mean max_"),
        (["--prompt", "EMPTY"], "no text file"),
        (["--prompt", "BINARY"], "no text in UTF-8"),
        (["--prompt", "  "], "has no text"),
        (["--prompt", "a text", "--questions", "EMPTY/none.txt"], "`--questions` .*none.txt' is no file"),
        (["--prompt", "a text", "--questions", "BLANK"], "holds no question"),
        (["--prompt", "a text", "--save-memory", "BLANK"], "`--save-memory`.*choose a new folder"),
        (["--prompt", "a text", "--save-memory", "new", "--no-memory"], "--save-memory.*--no-memory"),
        (["--load-memory", "EMPTY"], "`--load-memory`.*holds no memory"),
        (["--load-memory", "EMPTY", "--save-memory", "new"], "give one of them"),
        (["--load-memory", "EMPTY", "--no-memory"], "--load-memory.*--no-memory"),
        (["--load-memory", "EMPTY", "--memory.window", "8"], "leave out"),
        (["--prompt", "a text", "--sources", "-1"], "`--sources` must be at least 0, got -1"),
        (["--prompt", "a text", "--source-heads", "-1"], "`--source-heads` must be at least 0, got -1"),
    ],
)
def test_bad_inputs_are_refused_in_one_line_before_the_model_is_looked_for(tmp_path, capsys, options, message):
    for name in ("EMPTY", "FILES"):
        (tmp_path / name).mkdir()
    (tmp_path / "FILES" / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "FILES" / "BLANK").write_text(" \n\n")
    places = {"EMPTY": tmp_path / "EMPTY", "EMPTY/none.txt": tmp_path / "EMPTY" / "none.txt"}
    places |= {name: tmp_path / "FILES" / name for name in ("BINARY", "BLANK")}
    assert main(["nowhere/at-all", *(str(places.get(option, option)) for option in options)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
