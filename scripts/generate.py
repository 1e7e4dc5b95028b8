"""Let a model read documents of any length and answer questions about them.

graft-generate MODEL --prompt book.txt notes/ --question "Who is Ahab?" --max_new_tokens 100
graft-generate MODEL --prompt book.txt --save-memory book-memory   # then questions, as they are typed
graft-generate MODEL --load-memory book-memory --questions questions.txt
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.scripts.exit_codes import exit_code

if TYPE_CHECKING:
    from graft.trainer.conversation import Conversation


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what it leaves: `--memory.field value` and fields of GenerationConfig."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="`--memory.FIELD VALUE` sets an option of the memory, `--FIELD VALUE` one of GenerationConfig, such as "
        "`--max_new_tokens 100`, which is what an answer has at most unless the model's folder says otherwise.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or id of a model, of an adapter, or of a finished run")
    parser.add_argument("--revision", help="commit, tag or branch of an id; an adapter names that of its base")
    read = parser.add_mutually_exclusive_group(required=True)
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    read.add_argument(
        "--prompt", **several, help="documents: files, folders of text files, a text, or - for standard input"
    )
    read.add_argument("--load-memory", type=Path, metavar="DIR", help="answer from what --save-memory kept")
    parser.add_argument("--save-memory", type=Path, metavar="DIR", help="keep what was read in a new folder")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", **several, help="asked after the documents, each apart; typed if none is given")
    asked.add_argument("--questions", type=Path, metavar="FILE", help="a file of questions, one a line")
    parser.add_argument("--prefix", default="", help="text before the documents")
    parser.add_argument("--suffix", default="", help="text after documents and question")
    parser.add_argument("--chat", action="store_true", help="prefix and suffix from the tokenizer's chat template")
    parser.add_argument("--no-memory", action="store_true", help="the model as it is")
    parser.add_argument("--sources", type=int, default=3, help="passages to quote with each answer (default 3)")
    parser.add_argument(
        "--source-heads",
        type=int,
        default=2,
        help="quote what so many heads of a decoder read that find what they are asked (default 2; 0: all heads)",
    )
    parser.add_argument("--report", type=Path, metavar="PAGE", help="write a page that shows what was read")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; 2 and one line on stderr for a user's mistake."""
    given, rest = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("graft.trainer.conversation").setLevel(logging.INFO)  # what reading will cost, before it starts
    return exit_code("graft-generate", lambda: converse(given, rest))


def converse(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Read, or load what was read, and answer; `rest` as `parse` left it."""
    from graft.trainer.conversation import Conversation, Request
    from graft.trainer.generation import options_of
    from graft.trainer.named_texts import named_texts, questions_in

    check(given)
    questions = questions_in(given.questions) if given.questions else given.question
    documents = named_texts(given.prompt)
    memory, generation = options_of(rest)
    texts = {name: getattr(given, name) for name in ("prefix", "suffix", "chat", "trust_remote_code", "revision")}
    texts |= {"sources": given.sources, "source_heads": given.source_heads}
    options: dict[str, Any] = {"memory": None if given.no_memory else memory, "generation": generation}
    request = Request(given.model, saved=given.load_memory, streams=True, **texts, **options)
    with Conversation(request) as conversation:
        conversation.load() if given.load_memory else conversation.give(documents)
        if given.save_memory:
            conversation.save(given.save_memory)
        answer_all(conversation, questions, given)


def check(given: argparse.Namespace) -> None:
    """Refuse, before anything is read, options that do not go together.

    Raises:
        ValueError: names them.
    """
    if given.no_memory and (given.report or given.save_memory):
        option = "--report" if given.report else "--save-memory"
        raise ValueError(f"`{option}` is about the memory, and `--no-memory` leaves it out.")
    if given.save_memory and given.load_memory:
        raise ValueError(
            "`--save-memory` keeps what is read now, and `--load-memory` reads nothing: give one of them."
        )
    if (
        given.save_memory
        and given.save_memory.exists()
        and (not given.save_memory.is_dir() or any(given.save_memory.iterdir()))
    ):
        raise ValueError(f"`--save-memory` {str(given.save_memory)!r} is there already: choose a new folder.")
    for name in ("sources", "source_heads"):
        if getattr(given, name) < 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 0, got {getattr(given, name)}.")


def answer_all(conversation: "Conversation", questions: Sequence[str], given: argparse.Namespace) -> None:
    """Answer the questions given, or those typed or piped in; the documents alone if there are none."""
    typed = not questions and not conversation.is_encoder_decoder and given.prompt != ["-"]
    number = 0
    for number, question in enumerate(asked() if typed else questions or [""], start=1):  # noqa: B007
        if len(questions) > 1:
            print(f"\n> {question}", file=sys.stderr)
        try:
            answer_one(conversation, question, numbered(given.report, number))
        except (ValueError, KeyboardInterrupt) as error:
            if not (typed and sys.stdin.isatty()):
                raise
            # What was read is kept: the next question may be better, or its answer shorter.
            print(f"\ngraft-generate: {str(error) or 'the answer was interrupted.'}", file=sys.stderr)
    if typed and not number and not given.save_memory and not given.load_memory:
        answer_one(conversation, "", given.report)


def answer_one(conversation: "Conversation", question: str, page: Path | None) -> None:
    """The answer on stdout, its sources on stderr."""
    answer = conversation.ask(question, page)
    if not conversation.streams:
        print(answer.text)
    for source in answer.sources:
        print(
            f"[{source.document}, tokens {source.start:,}-{source.end:,}, {100 * source.share:.1f} %] {source.text!r}",
            file=sys.stderr,
        )


def asked() -> Iterator[str]:
    """Questions from the terminal until an empty one, or the lines of standard input."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    while True:
        print("\nQuestion (empty to leave): ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def numbered(page: Path | None, number: int) -> Path | None:
    """The page of the first question, and page-2, page-3, ... of those behind it."""
    return page if page is None or number == 1 else page.with_name(f"{page.stem}-{number}{page.suffix}")


if __name__ == "__main__":
    raise SystemExit(main())
