"""Pictures of text lines with known words, as a text recognizer reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 48, 320
MARGIN = 8
GREY = 128
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip
_LIST = """
about above accept across action address advice afraid after again agree airport almost alone
already always amount angle animal annual answer apple april argue arrive article asleep august
autumn average balance banana basket battery beach beauty before begin behind believe below bench
better between bicycle billion biology birthday bitter blanket border borrow bottle bottom bread
breakfast bridge bright broken brother bucket budget building butter button camera campus candle
capital captain carbon careful carpet castle catalog ceiling center century certain chair chance
channel chapter cheese cherry choice circle citizen classic climate clothes coffee collect color
column comfort common company compare concert contact copper corner correct cotton country couple
courage cousin create crowd culture current custom damage danger daughter december decide deliver
demand depend desert design detail develop dinner direct discover distance divide doctor dollar
double dozen dragon drawing dream during early earth eastern economy editor effect eight electric
eleven empty energy engine enough entire equal escape evening event every exact example except
expect explain export fabric factory family famous farmer father favorite february fellow figure
final finger finish flight flower follow foreign forest forget formula forward fourth freedom
frequent friday friend frozen future galaxy garden general gentle glass global golden grammar
ground growth guitar habit hammer handle happen harbor harvest health height hidden history holiday
honest hospital hotel hundred hungry husband imagine important include income industry inside
instead interest invite island january jacket journey judge juice july june jungle justice keyboard
kitchen knife knowledge ladder language large laugh leader leather lemon lesson letter library
"""
WORDS = _LIST.split()


@dataclass(frozen=True)
class Lines:
    """Text lines as pictures.

    Attributes:
        images: RGB, uint8 of shape ``(n, 48, width, 3)``.
        texts: What is written.
        turned: Which are upside down.
    """

    images: NDArray[np.uint8]
    texts: tuple[str, ...]
    turned: NDArray[np.bool_]


def font_files(folder: Path) -> list[Path | None]:
    """Return those of ``FONTS`` that a folder has, and ``None`` for Pillow's own font."""
    files = [folder / f"{name}.ttf" for name in FONTS]
    return [None, *(file for file in files if file.exists())]


def text_lines(
    count: int,
    *,
    seed: int,
    part: int,
    fonts: list[Path | None],
    width: int = WIDTH,
    turns: bool = False,
) -> Lines:
    """Return lines of random words and numbers.

    Args:
        count: Number of lines.
        seed: Random seed.
        part: 0 or 1: the half of the words that they are drawn from, so that two parts share none.
        fonts: As :func:`font_files` gives them.
        width: Of the pictures.
        turns: Whether half of the lines are upside down.
    """
    random = np.random.default_rng((seed, part))
    images, texts = [], []
    turned = np.arange(count) % 2 == 1 if turns else np.zeros(count, bool)
    for upside_down in turned:
        font = _font(fonts[random.integers(len(fonts))], int(random.integers(22, 35)))
        text = _text(random, font, part, width)
        texts.append(text)
        line = _picture(random, font, text, width)
        whole = np.full((HEIGHT, width, 3), GREY, np.uint8)
        whole[:, : line.shape[1]] = line[::-1, ::-1] if upside_down else line
        images.append(whole)
    return Lines(np.stack(images), tuple(texts), turned)


def _font(file: Path | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _text(random: np.random.Generator, font: ImageFont.FreeTypeFont, part: int, width: int) -> str:
    text = _word(random, part)
    for _ in range(int(random.integers(0, 4))):
        longer = f"{text} {_word(random, part)}"
        if font.getlength(longer) > width - MARGIN:
            break
        text = longer
    return text


def _word(random: np.random.Generator, part: int) -> str:
    if random.random() < 0.2:
        number = int(random.integers(10, 100_000))
        return str(random.choice([f"{number}", f"{number:,}", f"{number / 100:.2f}"]))
    word = str(random.choice(WORDS[part::2]))
    return str(random.choice([word, word, word.capitalize(), word.upper()]))


def _picture(
    random: np.random.Generator, font: ImageFont.FreeTypeFont, text: str, most: int
) -> NDArray[np.uint8]:
    """Return a line as a detector cuts it out: slightly turned, blurred and noisy."""
    ground, ink = random.integers(150, 256, size=3), random.integers(0, 90, size=3)
    if random.random() < 0.3:
        ground, ink = ink, ground
    paper, color = (tuple(int(each) for each in one) for one in (ground, ink))
    width = min(round(font.getlength(text)) + MARGIN, most)
    picture = Image.new("RGB", (width, HEIGHT), paper)
    middle = HEIGHT / 2 + random.uniform(-2, 2)
    ImageDraw.Draw(picture).text((MARGIN / 2, middle), text, fill=color, font=font, anchor="lm")
    turned = picture.rotate(random.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    blurred = turned.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.3)))
    noisy = np.asarray(blurred) + random.normal(0, random.uniform(2, 35), (HEIGHT, width, 3))
    return noisy.round().clip(0, 255).astype(np.uint8)
