"""Let a model read a document of any length and answer.

python scripts/generate.py MODEL --prompt book.txt --question "Who is Ahab?" --max_new_tokens 100 --report page.html
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what it leaves: `--memory.field value` and fields of GenerationConfig."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="`--memory.FIELD VALUE` sets an option of the memory, `--FIELD VALUE` one of GenerationConfig, such as "
        "`--max_new_tokens 100`.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or id of a model, of an adapter, or of a finished run")
    parser.add_argument("--prompt", required=True, help="the document: a file, a text, or - for standard input")
    parser.add_argument("--question", default="", help="asked after the document; kept apart from the memory")
    parser.add_argument("--prefix", default="", help="text before the document")
    parser.add_argument("--suffix", default="", help="text after document and question")
    parser.add_argument("--chat", action="store_true", help="prefix and suffix from the tokenizer's chat template")
    parser.add_argument("--no-memory", action="store_true", help="the model as it is")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="write a page that shows what was read")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; 2 and one line on stderr for a user's mistake."""
    given, rest = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("graft.trainer.generation").setLevel(logging.INFO)  # what reading will cost, before it starts
    from graft.trainer.generation import Request, answer, options_of, text_of

    texts = {name: getattr(given, name) for name in ("prefix", "suffix", "question", "chat", "report")}
    try:
        memory, generation = options_of(rest)
        options: dict[str, Any] = {
            "memory": None if given.no_memory else memory,
            "generation": generation,
            "streams": True,
        }
        options["trust_remote_code"] = given.trust_remote_code
        result = answer(Request(given.model, text_of(given.prompt), **texts, **options))
    except (ValueError, OSError) as error:
        print(f"graft-generate: {error}", file=sys.stderr)
        return 2
    if generation.get("num_beams", 1) != 1:  # else the text was streamed
        print(result.text)
    for passage in result.passages:
        print(f"[{passage.start:,}-{passage.end:,}, {100 * passage.share:.1f} %] {passage.text!r}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
