import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from graft.trainer.evaluation import Evaluation
from graft.trainer.metrics import exact_match
from graft.trainer.model_card import (
    MARKER,
    CardFacts,
    base_license,
    model_card,
    scores_of,
    usage_snippet,
    write_model_card,
)


@pytest.fixture
def evaluation():
    losses = np.array([[1.0, 2.0, -100.0], [3.0, -100.0, -100.0], [2.0, 2.0, 2.0]], dtype=np.float32)
    rows = {"id": ["a", "b", "c"], "references": [["x"], ["y"], ["z"]]}
    done = Evaluation("eval_full", rows, losses, ["x", "no", "z"], [1, 1, 1], [0.1] * 3)
    done.score([exact_match], by_position=False)
    return done


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_card_names_all_scores_with_intervals_around_them(evaluation):
    facts = CardFacts(
        "me/model", "me/model", "seq2seq", base_model="them/base", scores=scores_of({"eval_full": evaluation})
    )
    card = model_card(facts)
    metadata = front_matter(card)
    reported = {m["name"]: m["value"] for r in metadata["model-index"][0]["results"] for m in r["metrics"]}
    assert reported["eval_full_loss"] == pytest.approx(2.0)
    assert reported["eval_full_exact_match"] == pytest.approx(200 / 3)
    assert metadata["base_model"] == "them/base"
    assert metadata["base_model_relation"] == "finetune"
    for score in facts.scores:
        low, high = score.interval
        assert low <= score.value <= high
        assert f"| eval_full | {score.metric} |" in card
    assert ModelCard(card).data.model_name == "me/model"


def test_nothing_unknown_is_invented():
    card = model_card(CardFacts("model", "out", "causal"))
    metadata = front_matter(card)
    assert not {"license", "language", "datasets", "base_model", "metrics", "model-index"} & set(metadata)
    assert "None" not in card
    assert "trained from random weights" in card


@pytest.mark.parametrize(
    ("subject", "said"), [("unlimiformer", "memory"), ("retro", "retrieval"), ("graph", "graph-aware"), (None, "")]
)
@pytest.mark.parametrize("relation", ["finetune", "adapter"])
def test_the_intended_use_speaks_of_the_abilities_it_has_and_of_no_other(subject, said, relation):
    facts = CardFacts("model", "out", "causal", relation=relation, subjects=[subject] if subject else [])
    section = model_card(facts).partition("## Intended use\n")[2].partition("\n## ")[0]
    assert "text continuation" in section
    assert [word for word in ("Its memory", "Its retrieval", "Its graph-aware") if word in section] == (
        [f"Its {said}"] if said else []
    )
    assert ("It is an adapter" in section) == (relation == "adapter")


def test_a_base_on_this_machine_is_not_put_where_the_hub_expects_an_id(tmp_path):
    card = model_card(CardFacts("model", "out", "causal", base_model=str(tmp_path)))
    assert "base_model" not in front_matter(card)
    assert str(tmp_path) in card


def test_what_a_person_wrote_below_the_marker_is_kept(tmp_path):
    facts = CardFacts("model", "out", "causal")
    write_model_card(tmp_path, facts)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Notes\n\nMine.\n")
    write_model_card(tmp_path, CardFacts("renamed", "out", "causal"))
    text = path.read_text()
    assert text.count(MARKER) == 1
    assert text.endswith("## Notes\n\nMine.\n")
    assert "# renamed" in text
    assert "# model\n" not in text


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
@pytest.mark.parametrize("relation", ["finetune", "adapter"])
@pytest.mark.parametrize("memory", [None, {"local_tokens": 8}])
@pytest.mark.parametrize("custom_code", [True, False])
def test_usage_snippet_is_python_with_the_right_class(task, relation, memory, custom_code):
    facts = CardFacts("me/model", "me/model", task, relation=relation, memory=memory, custom_code=custom_code)
    snippet = usage_snippet(facts)
    compile(snippet, "snippet", "exec")
    auto = ("AutoPeftModelFor" if relation == "adapter" else "AutoModelFor") + {
        "seq2seq": "Seq2SeqLM",
        "causal": "CausalLM",
    }[task]
    assert f"{auto}.from_pretrained" in snippet
    assert snippet.count("trust_remote_code=True, revision=") == (2 if custom_code else 0)  # else the tokenizer asks
    assert ("UnlimiformerConfig(local_tokens=8)" in snippet) == (memory is not None)


def test_licence_comes_from_the_base_card_or_not_at_all(tmp_path):
    assert base_license(None) is None
    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    assert base_license(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("# base\n")
    assert base_license(str(tmp_path)) is None
