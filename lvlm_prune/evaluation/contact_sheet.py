"""One picture with images of the benchmark, what is asked about them, and the right answers.

python -m lvlm_prune.evaluation.contact_sheet contact-sheet.png
"""

import sys

from PIL import Image, ImageDraw, ImageFont

from lvlm_prune.demo.world import IMAGE_SIZE
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark

_COLUMNS, _WIDTH, _LINE, _MARGIN = 2, 520, 16, 8


def contact_sheet() -> Image.Image:
    """Images of the test split with their questions and answers beside them, text-only questions at the bottom."""
    questions = EmbeddedBenchmark(num_images=6, num_text=8, seed=0).questions
    by_image: dict[int, list[str]] = {}
    for question in questions:
        by_image.setdefault(id(question.image), []).append(
            f"{question.task.replace('_', ' ')}: {question.question} {question.answer}"
        )
    text_only = by_image.pop(id(None), [])
    tile = max(IMAGE_SIZE, max(map(len, by_image.values())) * _LINE) + _MARGIN
    rows = -(-len(by_image) // _COLUMNS)
    text_height = -(-len(text_only) // _COLUMNS) * _LINE
    size = (_COLUMNS * _WIDTH + _MARGIN, rows * tile + text_height + 2 * _MARGIN)
    sheet = Image.new("RGB", size, (255, 255, 255))
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    images = {id(question.image): question.image for question in questions}
    for position, (identity, lines) in enumerate(by_image.items()):
        left, top = _MARGIN + position % _COLUMNS * _WIDTH, _MARGIN + position // _COLUMNS * tile
        image = images[identity]
        assert image is not None
        sheet.paste(image, (left, top))
        for number, line in enumerate(lines):
            canvas.text((left + IMAGE_SIZE + _MARGIN, top + number * _LINE), line, font=font, fill=(0, 0, 0))
    for position, line in enumerate(text_only):
        left, top = _MARGIN + position % _COLUMNS * _WIDTH, _MARGIN + rows * tile + position // _COLUMNS * _LINE
        canvas.text((left, top), line, font=font, fill=(0, 0, 0))
    return sheet


if __name__ == "__main__":
    contact_sheet().save(sys.argv[1], optimize=True)
