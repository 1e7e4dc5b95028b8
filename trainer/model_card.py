"""The README.md of a saved folder: what the model is, how it scored, a snippet that runs. Nothing in it is invented.

What a person writes below the marker line is kept when the card is written again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData

from graft.atomic_files import write_text

if TYPE_CHECKING:
    from graft.trainer.evaluation import Evaluation

MARKER = "<!-- graft: what you write below this line is kept when this card is written again -->"

_OUR_METHODS = {"SPARSE_GIN": "sparse GIN", "RETROFIT": "retrofit"}  # need graft to be loaded

_PICTURES = ("loss.png", "graph_parameters.png")

_INTENDED = {
    "unlimiformer": "Its memory is for inputs longer than the window that the base reads at once.",
    "retro": "Its retrieval is for text that can lean on passages of a corpus given to it.",
    "graph": "Its graph-aware attention is for research on attention read as a graph.",
}

_CITATIONS = {
    "unlimiformer": """@inproceedings{bertsch2023unlimiformer,
  title = {Unlimiformer: Long-Range Transformers with Unlimited Length Input},
  author = {Bertsch, Amanda and Alon, Uri and Neubig, Graham and Gormley, Matthew R.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2305.01625},
  archivePrefix = {arXiv}
}""",
    "retro": """@inproceedings{borgeaud2022retro,
  title = {Improving Language Models by Retrieving from Trillions of Tokens},
  author = {Borgeaud, Sebastian and others},
  booktitle = {International Conference on Machine Learning},
  year = {2022},
  eprint = {2112.04426},
  archivePrefix = {arXiv}
}""",
    "graph": """@article{buehler2025graphaware,
  title = {Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers},
  author = {Buehler, Markus J.},
  year = {2025},
  eprint = {2501.02393},
  archivePrefix = {arXiv}
}""",
}


@dataclass(frozen=True)
class Score:
    """One value of one evaluation; the interval is a 95 % bootstrap over rows, None for corpus values."""

    evaluation: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    rows: int


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells; what is None or empty is left out.

    Args:
        name: the repository's id, or the folder's name.
        folder: what the snippet loads: the same id, or the folder.
        task: "seq2seq" or "causal".
        base_model: id or folder of the model that was trained further; None after training from scratch.
        relation: of `base_model`: "finetune" or "adapter".
        method: PEFT's name of the adapter's method, such as "LORA".
        custom_code: the folder holds code that `trust_remote_code` loads.
        memory: non-default options of the memory to attach in the snippet; None without memory, or if it is inside.
        abilities: one Markdown section each.
        subjects: of the abilities, each a tag and a citation.
        run: heading -> text for the table of the run (command, hardware, hours, versions, ...).
    """

    name: str
    folder: str
    task: str
    base_model: str | None = None
    relation: str = "finetune"
    method: str = "LORA"
    custom_code: bool = False
    memory: Mapping[str, Any] | None = None
    abilities: Sequence[str] = ()
    subjects: Sequence[str] = ()
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    license: str | None = None
    tags: Sequence[str] = ()
    scores: Sequence[Score] = ()
    command: str | None = None
    run: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[str] = ()


def scores_of(evaluations: Mapping[str, Evaluation]) -> list[Score]:
    """Every finite value of every evaluation, with an interval where the value is a mean."""
    scores = []
    for name, evaluation in evaluations.items():
        for metric, value in evaluation.values.items():
            if not math.isfinite(value):
                continue
            scores.append(Score(name, metric, value, evaluation.interval(metric), len(evaluation)))
    return scores


def model_card(facts: CardFacts) -> str:
    """The card in Markdown with its front matter, without what a person may have added."""
    sections = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {facts.name.rpartition('/')[2]}",
        _description(facts),
        "## Intended use",
        _intended_use(facts),
        *facts.abilities,
        "## Use",
        f"```python\n{usage_snippet(facts)}\n```",
    ]
    if facts.scores:
        sections += ["## Results", _results_table(facts.scores)]
    sections += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in facts.pictures]
    if facts.command or facts.run:
        sections.append("## Training")
    if facts.command:
        sections.append(f"```bash\n{facts.command}\n```")
    if facts.run:
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.run.items())
        sections.append(f"| | |\n| --- | --- |\n{rows}")
    sections += ["## Limits", _limits(facts)]
    if cited := [_CITATIONS[subject] for subject in dict.fromkeys(facts.subjects)]:
        sections += ["## Citation", "```bibtex\n" + "\n".join(cited) + "\n```"]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md in `folder`; what stands below the marker line of an earlier card is kept."""
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    added = before.partition(MARKER)[2].strip()
    return write_text(path, f"{model_card(facts)}\n{MARKER}\n" + (f"\n{added}\n" if added else ""))


def usage_snippet(facts: CardFacts) -> str:
    """Python that loads the saved folder and generates once."""
    auto = "AutoModelForSeq2SeqLM" if facts.task == "seq2seq" else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if facts.custom_code else ""
    if trust and facts.folder == facts.name and "/" in facts.name:
        trust += ', revision="COMMIT"'  # read the code of that commit first
    lines = [f"from transformers import {auto}, AutoTokenizer", "", f'folder = "{facts.folder}"']
    loading = f"{auto}.from_pretrained(folder{trust})"
    if facts.relation == "adapter":
        auto = auto.replace("Auto", "AutoPeft", 1)
        lines[0] = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
        loading = f"{auto}.from_pretrained(folder{trust})"
        if facts.method in _OUR_METHODS:  # PEFT loads no code with an adapter
            lines[0] = "import graft.registration\n" + lines[0]
    if facts.memory is not None:
        lines[0] = "from graft import UnlimiformerConfig, unlimiform\n" + lines[0]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})", f"model = {loading}"]
    lines += ['text = "A long document ..."', 'inputs = tokenizer(text, return_tensors="pt")']
    inputs = 'inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64'
    if facts.memory is None:
        lines.append(f"output = model.generate({inputs})")
    else:
        options = ", ".join(f"{name}={value!r}" for name, value in facts.memory.items())
        base = "model.get_base_model()" if facts.relation == "adapter" else "model"
        lines += [
            f"with unlimiform({base}, UnlimiformerConfig({options})) as unlimited:",
            f"    output = unlimited.generate({inputs})",
        ]
    lines.append("print(tokenizer.decode(output[0], skip_special_tokens=True))")
    return "\n".join(lines)


def base_license(folder: str | None) -> str | None:
    """The licence that the base model's own card in `folder` names; None if unknown, never a guess."""
    card = Path(folder) / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    try:
        values = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) else None


def facts_of_trainer(
    trainer: Any,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    **_: Any,
) -> CardFacts:
    """What a Trainer knows, under what `trainer.card` says (fields of CardFacts), under the arguments."""
    from graft.trainer.abilities import base_model, has_own_memory

    args, base = trainer.args, base_model(trainer.model)
    is_adapter = base is not trainer.model
    own_memory = has_own_memory(trainer.model)
    options = [ability.memory_options() for ability in trainer.abilities if hasattr(ability, "memory_options")]
    output = Path(args.output_dir or ".")
    wanted_tags = [tags] if isinstance(tags, str) else list(tags or [])
    name = args.hub_model_id or model_name or output.resolve().name
    known = {
        "name": name,
        "folder": name if args.push_to_hub else str(args.output_dir),
        "task": "seq2seq" if getattr(base.config, "is_encoder_decoder", False) else "causal",
        "base_model": finetuned_from or getattr(base.config, "_name_or_path", None) or None,
        "relation": "adapter" if is_adapter else "finetune",
        "method": _method(trainer.model) if is_adapter else "LORA",
        "custom_code": bool(getattr(base.config, "auto_map", None)) or own_memory,
        "memory": options[0] if options and not own_memory else None,
        "abilities": [ability.card_section() for ability in trainer.abilities],
        "subjects": [ability.subject for ability in trainer.abilities],
        "language": [language] if language else [],
        "license": license or base_license(finetuned_from or getattr(base.config, "_name_or_path", None)),
        "tags": wanted_tags,
        "scores": scores_of(trainer.evaluations),
        "pictures": [name for name in _PICTURES if (output / name).is_file()],
    }
    return CardFacts(**{**known, **trainer.card})


def _method(model: Any) -> str:
    """PEFT's name of the active adapter's method."""
    kind = model.peft_config[model.active_adapter].peft_type
    return str(getattr(kind, "value", kind))


def _front_matter(facts: CardFacts) -> str:
    tags = ["graft", *facts.subjects, *(["custom_code"] if facts.custom_code else [])]
    is_local = facts.base_model is not None and Path(facts.base_model).exists()
    base = None if is_local else facts.base_model  # the Hub takes ids here and nothing else
    values = ModelCardData(
        library_name="peft" if facts.relation == "adapter" else "transformers",
        pipeline_tag="text-generation" if facts.task == "causal" else "summarization",
        base_model=base,
        base_model_relation=facts.relation if base else None,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
        license=facts.license,
        tags=[*dict.fromkeys([*tags, *facts.tags])],
        metrics=sorted({score.metric for score in facts.scores}) or None,
    ).to_dict()
    if facts.scores:
        values["model-index"] = [{"name": facts.name, "results": _model_index(facts)}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _model_index(facts: CardFacts) -> list[dict[str, Any]]:
    task = "text-generation" if facts.task == "causal" else "summarization"
    dataset = facts.datasets[0] if facts.datasets else "local files"
    results = []
    for evaluation in dict.fromkeys(score.evaluation for score in facts.scores):
        metrics = [
            {"type": score.metric, "value": round(score.value, 6), "name": f"{evaluation}_{score.metric}"}
            for score in facts.scores
            if score.evaluation == evaluation
        ]
        where = {"name": f"{dataset} ({evaluation.replace('_', ' ')})", "type": dataset}
        results.append({"task": {"type": task}, "dataset": where, "metrics": metrics})
    return results


def _description(facts: CardFacts) -> str:
    kind = "A sequence-to-sequence model" if facts.task == "seq2seq" else "A causal language model"
    method = {"LORA": "LoRA", **_OUR_METHODS}.get(facts.method, facts.method)
    how = f"adapted ({method}) from" if facts.relation == "adapter" else "fine-tuned from"
    origin = {
        True: "trained from random weights",
        False: f"{how} `{facts.base_model}`",
    }[facts.base_model is None]
    data = f" on {', '.join(facts.datasets)}" if facts.datasets else ""
    return f"{kind} {origin}{data} with [graft](https://pypi.org/project/graft-transformers/)."


def _intended_use(facts: CardFacts) -> str:
    kind = "sequence to sequence" if facts.task == "seq2seq" else "text continuation"
    sentences = [f"For {kind} on text like that of its training; the figures below say nothing of other text."]
    sentences += [_INTENDED[subject] for subject in dict.fromkeys(facts.subjects) if subject in _INTENDED]
    if facts.relation == "adapter":
        sentences.append("It is an adapter: it works on the base it was trained on and on no other.")
    return " ".join(sentences)


def _results_table(scores: Sequence[Score]) -> str:
    lines = ["| evaluation | metric | value | 95 % interval | rows |", "| --- | --- | ---: | --- | ---: |"]
    for score in scores:
        interval = "" if score.interval is None else f"{score.interval[0]:.4g} to {score.interval[1]:.4g}"
        lines.append(f"| {score.evaluation} | {score.metric} | {score.value:.4g} | {interval} | {score.rows} |")
    return "\n".join(lines) + "\n\nIntervals are seeded bootstraps over rows; corpus values have none."


def _limits(facts: CardFacts) -> str:
    language = "" if facts.language else " Its languages were not recorded."
    return f"Tested on the evaluation rows above and on nothing else: no safety, bias or factuality tests.{language}"
