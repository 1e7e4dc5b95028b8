"""A page to try it: drop a document, see it read, ask, and see what was read for the answer.

graft-demo .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.scripts.exit_codes import exit_code

if TYPE_CHECKING:
    from graft.trainer.document_reader import DocumentReader

DEFAULT_MODEL = ".cache/smollm2-135m-instruct"
TEXT_FILES = [".txt", ".md", ".rst"]
FONTS = ["system-ui", "sans-serif"]  # the library's own would be fetched from elsewhere


def frame(page: str) -> str:
    """A whole page inside another one, where it can run and load nothing."""
    style = "width:100%;height:640px;border:0"
    return f'<iframe title="What was read" sandbox srcdoc="{escape(page)}" style="{style}"></iframe>'


def text_of_file(path: str) -> str:
    """The text of a dropped file.

    Raises:
        ValueError: it is of another kind, or not UTF-8.
    """
    if Path(path).suffix.lower() not in TEXT_FILES:
        raise ValueError(f"The file must end in {', '.join(TEXT_FILES)}, got {Path(path).name!r}.")
    return Path(path).read_text(encoding="utf-8")  # an error of decoding is a ValueError


def build_page(reader: DocumentReader) -> Any:
    """The page around a reader, a `gradio.Blocks`; each visitor has a memory of their own."""
    import gradio

    def read(path: str | None, pasted: str) -> Iterator[tuple[Any, str, Any]]:
        yield None, "Reading...", gradio.update(interactive=False)
        try:
            document = text_of_file(path) if path else pasted
            for reading in reader.read(document):
                share = 100 * reading.tokens / reading.total
                yield None, f"Reading: {reading.tokens:,} of {reading.total:,} tokens ({share:.0f} %)", gradio.update()
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error)) from error
        size = reading.memory.nbytes / 2**20
        said = f"Read all {reading.total:,} tokens; the memory takes {size:,.1f} MB. Ask."
        yield reading.memory, said, gradio.update(interactive=True)

    def ask(memory: Any, question: str) -> Iterator[tuple[str, list[list[str]], str]]:
        yield "", [], ""
        try:
            for reply in reader.ask(memory, question):
                rows = [[f"{p.start:,}-{p.end:,}", f"{100 * p.share:.1f} %", p.text] for p in reply.passages]
                yield reply.text, rows, frame(reply.page) if reply.page else ""
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="graft", analytics_enabled=False) as page:
        gradio.Markdown("# graft: a model that remembers what it read\nDrop a document of any length, or paste one.")
        memory = gradio.State(None, time_to_live=3600)
        with gradio.Row():
            with gradio.Column():
                file = gradio.File(label="Document", file_types=TEXT_FILES, elem_id="file")
                pasted = gradio.Textbox(label="or its text", lines=6, max_lines=6, elem_id="pasted")
                reads = gradio.Button("Read", variant="primary", elem_id="read")
                status = gradio.Markdown("Nothing has been read.", elem_id="status")
            with gradio.Column():
                question = gradio.Textbox(label="Question", elem_id="question")
                asks = gradio.Button("Ask", variant="primary", interactive=False, elem_id="ask")
                answer = gradio.Textbox(label="Answer", lines=4, elem_id="answer")
                header = ["tokens", "share", "text"]
                widths = ["20%", "15%", "65%"]
                passages = gradio.Dataframe(
                    headers=header, label="Most read", wrap=True, interactive=False, column_widths=widths
                )
        heat = gradio.HTML(elem_id="heat")
        reads.click(read, [file, pasted], [memory, status, asks])
        asks.click(ask, [memory, question], [answer, passages, heat])
        question.submit(ask, [memory, question], [answer, passages, heat])
    return page


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what it leaves: `--memory.field value` and fields of GenerationConfig."""
    parser = argparse.ArgumentParser(
        prog="graft-demo",
        description=__doc__.partition("\n")[0],
        epilog="`--memory.FIELD VALUE` sets an option of the memory, `--FIELD VALUE` one of GenerationConfig.",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder or id of a decoder (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; 2 and one line on stderr for a user's mistake."""
    given, rest = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-demo", lambda: serve(given, rest))


def serve(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Load the model, then serve the page; `rest` as `parse` left it."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("needs gradio: pip install 'graft-transformers[demo]'") from error
    from graft.trainer.document_reader import DocumentReader
    from graft.trainer.generation import options_of

    memory, generation = options_of(rest)
    reader = DocumentReader(given.model, memory, generation, given.trust_remote_code)
    page = build_page(reader)
    theme = gradio.themes.Base(font=FONTS, font_mono=["monospace"])
    page.launch(server_name=given.host, server_port=given.port, share=False, theme=theme, max_file_size="5mb")


if __name__ == "__main__":
    raise SystemExit(main())
