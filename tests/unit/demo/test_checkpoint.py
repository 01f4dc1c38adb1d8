"""The embedded checkpoint is what its card says: it loads anywhere, is small, and answers."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.demo.datasets import CalibrationCaptions
from lvlm_prune.demo.processing import build_tokenizer
from lvlm_prune.demo.questions import TEXT_TASKS, VISION_TASKS
from lvlm_prune.evaluation.answers import score
from lvlm_prune.evaluation.contact_sheet import contact_sheet
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


def test_folder_is_found_without_importing_torch():
    code = "import sys; from lvlm_prune.demo import CHECKPOINT; assert CHECKPOINT.is_dir(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "PIL", "numpy"} & set(loaded)


def test_loads_without_torchvision_and_without_a_warning():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration\n"
        "folder = sys.argv[1]\n"
        "AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)\n"
        "print(type(LlavaForConditionalGeneration.from_pretrained(folder)).__name__)"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code, str(CHECKPOINT)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [LlavaForConditionalGeneration.__name__]
    assert "warning" not in result.stderr.lower()


def test_is_as_small_as_promised(model):
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 12e6
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 13e6
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "bfloat16"
    linears = [module for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 6 * 7
    assert all(linear.in_features % 8 == 0 for linear in linears)


def test_tokenizer_is_the_one_that_the_training_command_makes(processor):
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert processor.tokenizer.chat_template is None or "<|assistant|>" in processor.tokenizer.chat_template


def test_a_calibration_sample_has_144_visual_tokens_and_a_caption(model, processor):
    item = CalibrationCaptions()[3]
    text = processor.apply_chat_template(item["messages"])
    inputs = processor(text=text, images=item["images"], return_tensors="pt")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert visual == 144
    assert 45 <= inputs["input_ids"].shape[1] - visual <= 140
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)).loss
    assert loss < 3  # the question's own tokens were never trained; a random model has log(1024) = 6.9


def test_chat_template_takes_strings_turns_and_parts(processor):
    user = {"role": "user", "content": "What is 2 plus 2?"}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "4"}]}
    first = "<s><|user|> What is 2 plus 2?<|assistant|>"
    assert processor.apply_chat_template([user], add_generation_prompt=True) == first
    assert processor.apply_chat_template([user, assistant]) == f"{first} 4</s>"
    twice = processor.apply_chat_template([user, assistant, user], add_generation_prompt=True)
    assert twice == f"{first} 4</s><|user|> What is 2 plus 2?<|assistant|>"


def check_accuracy(model, processor, benchmark, least):
    scores = score(model, processor, benchmark.questions)
    assert set(scores.tasks) == {*VISION_TASKS, *TEXT_TASKS}
    below = {task: accuracy for task, accuracy in scores.tasks.items() if accuracy < least}
    assert not below, scores.tasks


def test_dense_accuracy_on_unseen_questions(model, processor):
    """A subset, so with some room for chance below the 95% of the whole benchmark."""
    check_accuracy(model, processor, EmbeddedBenchmark(num_images=25, num_text=80, seed=3), least=0.85)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_dense_accuracy_on_the_whole_benchmark(model, processor, seed):
    check_accuracy(model, processor, EmbeddedBenchmark(seed=seed), least=0.95)


def test_contact_sheet_is_the_one_in_the_folder():
    file = CHECKPOINT / "contact-sheet.png"
    assert file.stat().st_size < 400e3
    from PIL import Image

    assert contact_sheet().tobytes() == Image.open(file).convert("RGB").tobytes()
