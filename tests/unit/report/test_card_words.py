"""What a card does not say: more tokens than calibrated, and a model of the hub that is none."""

import pytest
from huggingface_hub import ModelCard

from lvlm_prune.output.base_record import pruned_how
from lvlm_prune.report.card import card_of, write_adapter_card
from tests.unit.report.test_card import DENSE, folder_of, pruned, recovered


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ({"text": 7938.0}, "(7938 text, 13824 image tokens, of which 7938 text, 0 image counted per block)"),
        ({"text": 7938.0, "image": 13824.0}, "(7938 text, 13824 image tokens)"),
    ],
)
def test_tokens_that_the_pool_left_out_are_not_told_as_calibration(taken, said, tmp_path):
    record = pruned(blocks=[{"index": 0, "pool": taken}, {"index": 1, "pool": taken}])
    assert said in card_of(folder_of(tmp_path, record), DENSE)
    of_recovered = recovered() | {"pruned": pruned_how(record)}
    assert said in card_of(folder_of(tmp_path, of_recovered, "recovery.json"), DENSE)


def test_an_adapter_of_a_local_folder_names_no_model_of_the_hub(tmp_path):
    (tmp_path / "adapter").mkdir()
    write_adapter_card(tmp_path / "adapter", recovered())
    adapter = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert adapter.data.library_name == "peft"
    assert "load_sparse_adapter" in adapter.text
    # A local folder's name would be a link to a model on the hub that is another one.
    assert "base_model" not in adapter.data.to_dict()
    assert "name it here as `base_model`" in adapter.text
    on_hub = recovered() | {"model": {"path": "owner/sparse", "class": "LlavaForConditionalGeneration"}}
    write_adapter_card(tmp_path / "adapter", on_hub)
    adapter = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (adapter.data.base_model, adapter.data.base_model_relation) == ("owner/sparse", "adapter")
    assert "name it here" not in adapter.text
    assert "AutoModelForImageTextToText.from_pretrained(PRUNED" in adapter.text
