"""The model card of an output: what it claims stands in the records; what the dense model's card claims is apart."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers.utils import is_torchvision_available

from lvlm_prune.data import load_processor
from lvlm_prune.output.base_record import pruned_how
from lvlm_prune.report.card import DENSE_CARD, card_of, refresh_card, write_card
from tests.hub_folders import write_folder

DENSE = """---
license: apache-2.0
tags: [vision]
base_model: somebody/pretrained
model-index:
- name: dense
  results:
  - task: {type: image-text-to-text}
    dataset: {type: x, name: x}
    metrics: [{type: accuracy, value: 99.7}]
---

# The dense model

It scores 99.7.
"""


_SIZE = {"shape": [100, 100], "achieved": 0.5991}


def pruned(**more) -> dict:
    plugins = {"pool": "a.AsymmetricPool", "scorer": "a.WandaScorer", "allocation": "a.UniformAllocation"}
    options = {name: {"class_path": path, "init_args": {}} for name, path in plugins.items()}
    return {
        "status": "complete",
        "model": {"path": "owner/dense", "class": "LlavaForConditionalGeneration", "folder": "/cache/dense"},
        "method": {"class_path": "x.BlockwisePruning", "init_args": {"name": "ATV", "exclude": ["q_proj"], **options}},
        "calibration": {
            "source": {"class_path": "a.LlavaJsonSource", "init_args": {"path": "/home/me/patients.json"}},
            "seed": 3,
            "num_samples": 96,
            "tokens": {"text": 7938, "image": 13824},
        },
        "sparsity": {"target": 0.6, "achieved": 0.5991},
        "pattern": "unstructured",
        "updates_weights": False,
        "linears": {"layers.0.k_proj": {**_SIZE, "block": 0, "target": 0.6, "pruned": 5991}},
        "verified": {"sparsity": 0.5991, "untouched_tensors": 89},
        "seconds": 12.3,
    } | more


def recovered() -> dict:
    record = pruned()
    how = {name: record[name] for name in ("method", "sparsity", "pattern", "calibration")}
    return {
        "status": "complete",
        "method": "lora",
        "pruned": how,
        "model": {"path": "/mine/pruned", "folder": "/mine/pruned", "class": "LlavaForConditionalGeneration"},
        "dense": {"path": "owner/dense", "folder": "/gone"},
        "data": {"samples": 40, "source": {"class_path": "a.LlavaJsonSource"}},
        "training": {"trainable_parameters": 2_000_000, "steps": 17},
        "pattern": "unstructured",
        "linears": {"layers.0.k_proj": {**_SIZE, "zeros": 5991}},
        "verified": {"sparsity": 0.6, "untouched_tensors": 89},
        "seconds": 3.4,
    }


def folder_of(tmp_path: Path, record: dict, name: str = "pruning.json") -> Path:
    (tmp_path / name).write_text(json.dumps(record))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_metadata_is_merged_and_results_of_the_dense_model_are_not_claimed(tmp_path):
    write_card(folder_of(tmp_path, pruned()), DENSE)
    card = ModelCard.load(tmp_path / "README.md")
    head = card.data.to_dict()
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "owner/dense"
    assert head["base_model_relation"] == "finetune"
    assert head["library_name"] == "transformers"
    assert head["tags"] == ["vision", "lvlm-prune", "pruned", "sparse"]
    assert "model-index" not in head
    own, dense = card.text.split(DENSE_CARD)
    assert "99.7" not in own
    assert dense.strip() == "# The dense model\n\nIt scores 99.7."


def test_it_says_what_was_done_and_that_nothing_was_scored(tmp_path):
    own = card_of(folder_of(tmp_path, pruned()), DENSE).split(DENSE_CARD)[0]
    for said in (
        "pruned to 60% by ATV",
        "1 Linears, 10.0 k weights",
        "59.91% of these weights (asked: 60%)",
        "AsymmetricPool, WandaScorer, UniformAllocation",
        "96 samples of LlavaJsonSource, seed 3 (7938 text, 13824 image tokens)",
        "89 other tensors, byte for byte",
        "excluded from pruning: q_proj",
        "Not scored",
        "AutoModelForImageTextToText.from_pretrained",
    ):
        assert said in own
    assert "/home/me" not in own
    assert "12.3" not in own


def test_it_says_which_linears_have_which_pattern_and_which_of_them_gpus_can_use(tmp_path):
    linears = {
        str(number): {**_SIZE, "block": 0, "target": part, "pruned": 0} for number, part in enumerate((0.0, 0.25, 0.75))
    }
    own = card_of(folder_of(tmp_path, pruned(pattern="3:4,2:4,1:4", linears=linears)), DENSE).split(DENSE_CARD)[0]
    assert "| 3:4,2:4,1:4 (Linears with each: 1:4 1, 3:4 1, dense 1) |" in own
    assert "can make use of 1 Linears (1:4 1), with software for it; not of 2 (3:4 1, dense 1)." in own


@pytest.mark.parametrize(
    ("pattern", "shares", "said"),
    [
        ("2:4", (0.5, 0.5), "can make use of all 2 Linears (2:4 2), "),
        ("4:8", (0.5, 0.5), "take 2:4, which no Linear has (4:8 2)."),
        ("2:4", (0.5, 0.0), "can make use of 1 Linears (2:4 1), with software for it; not of 1 (dense 1)."),
        ("3:4,2:4", (0.25, 0.25), "take 2:4, which no Linear has (3:4 2)."),
    ],
)
def test_it_promises_sparse_tensor_cores_for_the_linears_that_they_take(pattern, shares, said, tmp_path):
    linears = {str(number): {**_SIZE, "block": 0, "target": share, "pruned": 0} for number, share in enumerate(shares)}
    assert said in card_of(folder_of(tmp_path, pruned(pattern=pattern, linears=linears)), DENSE)


def test_after_recovery_a_linear_has_the_pattern_that_its_zeros_have(tmp_path):
    shares = {"q": 0.5, "k": 0.0003}
    linears = {name: {"shape": [8, 8], "achieved": share, "zeros": 0} for name, share in shares.items()}
    record = recovered() | {"linears": linears}
    record |= {"pattern": "2:4", "pruned": record["pruned"] | {"pattern": "2:4"}}
    said = card_of(folder_of(tmp_path, record, "recovery.json"), DENSE)
    assert "can make use of 1 Linears (2:4 1), with software for it; not of 1 (dense 1)." in said


@pytest.mark.parametrize(("target", "shown"), [(0.5, "50%"), (0.625, "62.5%")])
def test_a_sparsity_is_written_in_one_way(target, shown, tmp_path):
    linears = {"layers.0.k_proj": {"shape": [8, 8], "block": 0, "target": target, "pruned": 40, "achieved": target}}
    own = card_of(folder_of(tmp_path, pruned(sparsity={"target": target, "achieved": target}, linears=linears)), DENSE)
    assert f"pruned to {shown} by ATV" in own
    assert f"{shown} of these weights (asked: {shown})" in own


def test_an_evaluation_afterwards_is_on_the_card_and_the_dense_card_stays(tmp_path):
    folder = folder_of(tmp_path, pruned())
    write_card(folder, DENSE)
    before = (folder / "README.md").read_text()
    assert refresh_card(folder)
    assert (folder / "README.md").read_text() == before
    task = {"score": 0.5, "baseline": 0.8, "retention": 0.625, "questions": 8, "metric": "exact_match"}
    found = {"tasks": {"color": task}, "average": 0.5, "baseline_average": 0.8, "retention": 0.625}
    (folder / "evaluation.json").write_text(json.dumps(found))
    assert refresh_card(folder)
    own, dense = (folder / "README.md").read_text().split(DENSE_CARD)
    assert "62.5%" in own
    assert "Not scored" not in own
    assert dense == before.split(DENSE_CARD)[1]


@pytest.mark.parametrize("family", ["llava_next_llama", "qwen2_5_vl"])
def test_the_code_on_a_card_loads_the_model_or_the_card_says_what_is_missing(family, tmp_path, monkeypatch):
    model = write_folder(tmp_path, family)
    write_card(tmp_path, DENSE, pruned())
    card = (tmp_path / "README.md").read_text()
    code = re.search("```python\n(.*?)\n```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    *loads_model, loads_processor = code.splitlines()
    names: dict = {}
    exec("\n".join(loads_model), names)
    assert type(names["model"]) is type(model)
    takes_videos = family == "qwen2_5_vl"
    assert ("pip install torchvision" in card) == takes_videos
    if is_torchvision_available() or not takes_videos:
        exec(loads_processor, names)
    else:
        with pytest.raises(ImportError, match=r"(?i)torchvision"):
            exec(loads_processor, names)
        assert "`lvlm_prune.data.load_processor(THIS_MODEL)`" in card
        names["processor"] = load_processor(names["THIS_MODEL"])
    asking = re.search("## Ask it\n\n```python\n(.*?)\n```", card, re.DOTALL)[1]
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg")
    exec(asking, names)
    assert "pixel_values" in names["inputs"]
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_a_dense_model_without_a_card_is_not_said_to_have_one(tmp_path):
    record = pruned(
        model={"path": "/home/me/dense", "class": "LlavaForConditionalGeneration", "folder": "/home/me/dense"}
    )
    for text in ("", f"{DENSE_CARD}\n\nThe dense model came without a card.\n"):  # version 0.2 wrote that
        (tmp_path / "README.md").write_text(text)
        write_card(tmp_path, record=record)
        written = (tmp_path / "README.md").read_text()
        assert written.count("came without a card") == 1
        assert "below" not in written.replace("as below", "")


def test_a_card_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text(DENSE)
    assert not refresh_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == DENSE


def test_a_local_model_has_no_name_on_the_hub(tmp_path):
    (tmp_path / "mine").mkdir()
    record = pruned(model={"path": str(tmp_path / "mine"), "folder": str(tmp_path / "mine"), "class": "X"})
    text = card_of(folder_of(tmp_path, record), DENSE)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert str(tmp_path) not in text
    assert "# mine, pruned to 60% by ATV" in text


def test_a_recovered_checkpoint_says_how_it_was_pruned_and_trained(tmp_path):
    write_card(tmp_path, DENSE, pruned())
    write_card(folder_of(tmp_path, recovered(), "recovery.json"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/dense"
    own, dense = card.text.split(DENSE_CARD)
    assert "pruned to 60% by ATV, recovered" in own
    assert "17 steps on 40 samples of LlavaJsonSource" in own
    assert "| not trained | 89 other tensors" in own
    assert "stayed dense" not in own
    assert dense.strip().startswith("# The dense model")


def test_a_packed_checkpoint_needs_this_package_to_load(tmp_path):
    packing = {
        "status": "complete",
        "model": {"path": "x", "folder": "/x"},
        "config": {"format": "bitmask"},
        "packed": {"tensors": 42, "dense": 200, "packed": 100},
    }
    folder = folder_of(tmp_path, pruned())
    text = card_of(folder, DENSE, packing=packing)
    card = ModelCard(text)
    assert card.data.library_name == "lvlm-prune"
    assert "packed" in card.data.tags
    assert "import lvlm_prune" in card.text
    assert "42 tensors as bitmask, 2.00x smaller" in card.text


@pytest.mark.parametrize("dense", ["", "Text alone.", DENSE.replace("name: dense", "nothing: 1")])
def test_nothing_is_said_on_the_screen_of_a_card(dense, tmp_path, capfd):
    assert dense.rpartition("---")[2].strip() in card_of(folder_of(tmp_path, pruned()), dense)
    assert capfd.readouterr() == ("", "")


def test_a_card_whose_head_cannot_be_read_is_kept_as_text(tmp_path):
    broken = "---\nlicense: [mit\n---\nText."
    card = ModelCard(card_of(folder_of(tmp_path, pruned()), broken))
    assert "license" not in card.data.to_dict()
    assert card.text.split(DENSE_CARD)[1].strip() == broken


def places(value, path=()):
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("whole", [pruned(search={"keep": 0.9, "tries": []}), recovered()], ids=["pruned", "recovered"])
@pytest.mark.parametrize("wrong", [None, "x", [5], {}, "missing"], ids=str)
def test_a_record_of_another_version_gives_a_card_or_counts_as_none(whole, wrong, tmp_path):
    name = "recovery.json" if "training" in whole else "pruning.json"
    for path in places(whole):
        changed = json.loads(json.dumps(whole))
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = wrong
        if wrong == "missing":
            del part[path[-1]]
        assert "It scores 99.7." in card_of(folder_of(tmp_path, changed, name), DENSE), path


def test_a_card_is_left_alone_where_its_record_cannot_be_read(tmp_path):
    write_card(folder_of(tmp_path, pruned()), DENSE)
    before = (tmp_path / "README.md").read_bytes()
    assert refresh_card(folder_of(tmp_path, pruned()))
    assert not refresh_card(folder_of(tmp_path, {"status": "complete"}))
    assert (tmp_path / "README.md").read_bytes() == before


def test_a_model_that_was_sparse_before_is_not_called_dense(tmp_path):
    quality = {"samples": 4, "held_back": True, "tokens": 9, "perplexity": 5.0, "dense_perplexity": 4.0, "kl": 0.1}
    record = {**pruned(), "input_zeros": 0.5, "quality": quality | {"agreement": 0.9}}
    card = card_of(folder_of(tmp_path, record), DENSE)
    assert "What is left of the sparse model" in card
    assert "It had 50% zeros before it was pruned to this one." in card
    assert "all tensors are the sparse model's" in card
    assert "stayed as it was | 89 other" in card
    assert "stayed dense" not in card
    assert "Below is the card of the sparse model" in card
    assert "KL(input ‖ pruned) 0.1" in card
    assert "the input model's most likely token at 90.0%" in card


def test_a_recovered_model_whose_base_was_made_of_a_sparse_one_says_so(tmp_path):
    record = recovered()
    record["pruned"] = pruned_how({**pruned(), "input_zeros": 0.5})
    measured = {"samples": 4, "held_back": True, "tokens": 9, "perplexity": 5.0, "dense_perplexity": 4.0, "kl": 0.1}
    measured |= {"agreement": 0.9, "pruned_perplexity": 6.0, "pruned_kl": 0.2, "pruned_agreement": 0.8}
    card = card_of(folder_of(tmp_path, record | {"quality": measured}, "recovery.json"), DENSE)
    assert "What is left of the sparse model" in card
    assert "(input of pruning: 4), KL from the input of pruning 0.2 → 0.1" in card
    assert "Below is the card of the sparse model" in card


def test_a_model_that_was_made_of_one_of_our_sparse_models_says_so_whatever_was_pruned_there(tmp_path):
    """A vision tower may have been pruned before, in a run of its own: other weights than those of this run."""
    card = card_of(folder_of(tmp_path, pruned()), card_of(folder_of(tmp_path, pruned()), DENSE))
    own = card.split(DENSE_CARD)[0]
    assert "What is left of the sparse model" in own
    assert "stayed as it was | 89 other" in own
    assert "It had zeros before it was pruned to this one." in own


def test_zeros_that_another_tool_made_are_not_claimed(tmp_path):
    packing = {
        "status": "complete",
        "model": {"path": "/mine/sparse", "folder": "/mine/sparse"},
        "config": {"format": "bitmask"},
        "packed": {"tensors": 42, "dense": 200, "packed": 100},
    }
    packed = card_of(tmp_path, DENSE, packing=packing).split(DENSE_CARD)[0]
    assert "are zero, which was done by other tools" in packed
    assert "were set to zero" not in packed
    assert "Below is the card of the model that was packed, as it was.*" in packed
    (tmp_path / "recovered").mkdir()
    record = {**recovered(), "pruned": {}, "dense": {}}
    again = card_of(folder_of(tmp_path / "recovered", record, "recovery.json"), DENSE).split(DENSE_CARD)[0]
    assert "were set to zero" not in again
    assert "those that remain were then trained to give back accuracy, by lvlm-prune" in again


def test_it_says_how_questions_of_ones_own_are_asked(tmp_path):
    own, embedded = tmp_path / "own", tmp_path / "embedded"
    for folder, path in ((own, "owner/dense"), (embedded, "demo")):
        folder.mkdir()
        card = card_of(folder_of(folder, pruned(model={"path": path, "folder": "/x", "class": "X"})), DENSE)
        assert ("--engine.benchmark LocalBenchmark" in card) == (folder == own)


def test_experts_that_were_kept_stand_among_what_stayed_dense(tmp_path):
    record = pruned()
    record["method"]["init_args"]["experts"] = "keep"
    assert "; routed experts" in card_of(folder_of(tmp_path, record), DENSE)


def test_the_title_has_the_zeros_that_are_there(tmp_path):
    record = {**pruned(), "sparsity": {"target": 0.5, "achieved": 0.7}}
    record["linears"] = {name: entry | {"achieved": 0.7} for name, entry in record["linears"].items()}
    assert "# owner/dense, pruned to 70% by ATV" in card_of(folder_of(tmp_path, record), DENSE)


@pytest.mark.parametrize(
    ("solver", "named"),
    [
        ({"class_path": "lvlm_prune.methods.solvers.ALPSSolver"}, False),
        ({"class_path": "lvlm_prune.methods.solvers.RefitSolver", "init_args": {"start": None}}, True),
        (
            {
                "class_path": "lvlm_prune.methods.solvers.RefitSolver",
                "init_args": {"start": {"class_path": "lvlm_prune.methods.solvers.ALPSSolver"}},
            },
            False,
        ),
        ({"class_path": "mine.OwnSolver"}, True),
    ],
)
def test_a_scorer_that_no_solver_asks_is_not_named(tmp_path, solver, named):
    record = pruned()
    record["method"]["init_args"] |= {"name": "", "solver": {"init_args": {}, **solver}}
    card = card_of(folder_of(tmp_path, record), DENSE)
    assert solver["class_path"].rpartition(".")[2] in card
    assert ("WandaScorer" in card) == named
