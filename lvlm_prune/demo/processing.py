"""Tokenizer and processor of the embedded model, made from the generated questions alone.

    <s><|user|><image> What color is the star?<|assistant|> red</s>

`<image>` stands for 144 image tokens once the processor has expanded it. Digits are tokens of their own, and each token
of a word carries the space before it, so that a conversation tokenizes to the same tokens piece by piece.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from lvlm_prune.demo.facts import COUNTRIES
from lvlm_prune.demo.questions import TEXT_TASKS, caption, text_question, vision_questions
from lvlm_prune.demo.splits import random_for
from lvlm_prune.demo.world import IMAGE_SIZE, PATCH_SIZE, scene

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, USER_ID, ASSISTANT_ID = range(6)
VOCABULARY_SIZE = 1024

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only the roles user and assistant are known, got ' + message['role']) }}"
    "{% endif %}"
    "{% if message['content'] is string %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}"
    "{% set parts = message['content'] %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user|>' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}"
    "{% else %}"
    "{{ '<|assistant|>' }}"
    "{% generation %}"
    "{% for part in parts if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}"
    "{{ '</s>' }}"
    "{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SCENES, _QUESTIONS = 2000, 4000


def _corpus() -> list[str]:
    """Texts of the training split from which the vocabulary is learnt."""
    texts = []
    for index in range(_SCENES):
        described = scene("train", 0, index)
        rng = random_for("corpus", "train", 0, index)
        for asked in [*vision_questions(described, rng), caption(described, rng)]:
            texts += [f" {asked.question}", f" {asked.answer}"]
    rng = random_for("corpus", "train", 0, _SCENES)
    for _ in range(_QUESTIONS):
        asked = text_question(rng.choice(TEXT_TASKS), "train", rng)
        texts += [f" {asked.question}", f" {asked.answer}"]
    texts += [f" {name}" for country in COUNTRIES for name in country] * 20
    return texts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of 1,024 tokens, always the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: images to 144 x 144 pixels in [-1, 1], `<image>` to 144 tokens; needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_resize=True,
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 127.5,
        do_normalize=True,
        image_mean=[1.0, 1.0, 1.0],
        image_std=[1.0, 1.0, 1.0],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
