"""What may leave this machine: weights, configs, code and cards by an allow-list; pickles and predictions never."""

from __future__ import annotations

import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from graft.atomic_files import new_file, write_json

PUBLISHED = ("*.safetensors", "*.json", "*.jsonl", "*.py", "*.txt", "*.jinja", "*.model", "*.md", "*.png")
NOT_PUBLISHED = ("_*", "checkpoint-*", "predictions/*", "samples.jsonl", "trainer_state.json", "*.unfinished")


def check_hub_strategy(args: Any) -> None:
    """Refuse the two strategies of the stock that upload whole checkpoints.

    Raises:
        ValueError: names the strategy, the reason and what is allowed.
    """
    strategy = getattr(getattr(args, "hub_strategy", None), "value", None)
    if strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"`hub_strategy` {strategy!r} would publish the optimizer's pickles; use 'every_save' or 'end'."
        )


def is_published(name: str) -> bool:
    """Whether a file of a saved folder, named relative to it, may be uploaded."""
    allowed = any(fnmatch(name, pattern) for pattern in PUBLISHED)
    return allowed and not any(fnmatch(name, pattern) for pattern in NOT_PUBLISHED)


def without_pickled_arguments(folder: Path, args: Any) -> None:
    """Replace training_args.bin in `folder` by training_args.json, which holds no tokens."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    values = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    write_json(folder / "training_args.json", values)


def collect_checkpoint(checkpoint: Path, output: Path) -> None:
    """Copy the published files of a checkpoint to the output folder, each whole or not at all."""
    for source in sorted(checkpoint.iterdir()):
        if source.is_file() and is_published(source.name):
            with new_file(output / source.name) as unfinished:
                shutil.copyfile(source, unfinished)


def push_command(folder: Path, repo_id: str) -> str:
    """What to type to publish the same files of `folder` by hand."""
    chosen = [word for pattern in PUBLISHED for word in ("--include", pattern)]
    left_out = [word for pattern in NOT_PUBLISHED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *chosen, *left_out])


def publish(folder: Path, repo_id: str, message: str, blocking: bool = True, **options: Any) -> Any:
    """Upload the published files of `folder` in one commit; options go to `upload_folder`, such as token, revision.

    Returns:
        What the client returns: the commit, or its future if not `blocking`.
    """
    client: Any = HfApi()  # its overloads want a literal run_as_future
    return client.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        run_as_future=not blocking,
        allow_patterns=list(PUBLISHED),
        ignore_patterns=list(NOT_PUBLISHED),
        **options,
    )
