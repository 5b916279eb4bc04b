"""A picture of what a model sees of a set: images with their crops, the samples, and the control records."""

from pathlib import Path
from random import Random

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from improved_ldm.data.cuts import crop_box, cut_lines, is_mirrored
from improved_ldm.data.look import Seen
from improved_ldm.output import writing

BOX = 150  # side of the squares that an image and its sample are fitted into, pixels
GAP = 10  # pixels
TEXT, SMALL = 12, 11  # sizes of the fonts, pixels
LINE = 15  # height of a line of text, pixels
CAPTION_LINES = 2
COLUMNS = 4
CROP, FLIP, INK, FAINT, PAPER = "#d6006c", "#e07000", "#202020", "#707070", "#f4f4f2"
DIMMED = 0.6  # share of grey over what is outside the crop
TILE = (2 * BOX + GAP, BOX + GAP // 2 + (CAPTION_LINES + 2) * LINE)  # (width, height), pixels


class ContactSheet:
    """A random choice of the rows that it is given, drawn as tiles.

    Args:
        tiles: largest number of tiles.
        class_names: names of the classes in the order of their labels.

    Source: reservoir sampling, so that all rows are equally likely and few images are in memory.
    """

    def __init__(self, tiles: int, class_names: list[str] | None = None):
        self.tiles, self.class_names, self.given = tiles, class_names or [], 0
        self._drawn: dict[int, tuple[int, Image.Image]] = {}  # place in the reservoir → number of the row, tile
        self._random = Random(0)

    def add(self, seen: Seen):
        """Give a row to the choice."""
        place = self.given if self.given < self.tiles else self._random.randrange(self.given + 1)
        if place < self.tiles:
            self._drawn[place] = (self.given, draw_tile(seen, self._title(seen)))
        self.given += 1

    def _title(self, seen: Seen) -> str:
        if seen.caption is not None:
            return seen.caption or "(empty caption)"
        return self.class_names[seen.label] if seen.label < len(self.class_names) else f"class {seen.label}"

    def _legend(self, shown: int) -> str:
        return (
            f"{shown} of {self.given:,} rows, chosen at random. Left: the image, grey where it is cut away. Right: "
            "the sample that the model sees. Sizes are height x width, corners are top, left, all in pixels."
        )

    def save(self, file: Path):
        """Write the sheet as a PNG file, the tiles in the order of their rows.

        Raises:
            OutputError: if the file cannot be written.
        """
        tiles = [tile for _, tile in sorted(self._drawn.values(), key=lambda drawn: drawn[0])]
        columns = min(COLUMNS, max(len(tiles), 1))
        step = (TILE[0] + 2 * GAP, TILE[1] + 2 * GAP)
        top = GAP + 3 * LINE
        height = top + -(-len(tiles) // columns) * step[1] + GAP
        sheet = Image.new("RGB", (columns * step[0] + 2 * GAP, height), PAPER)
        draw = ImageDraw.Draw(sheet)
        for number, line in enumerate(_wrapped(self._legend(len(tiles)), _font(TEXT), sheet.width - 4 * GAP, 3)):
            draw.text((2 * GAP, GAP + number * LINE), line, INK, _font(TEXT))
        for number, tile in enumerate(tiles):
            row, column = divmod(number, columns)
            sheet.paste(tile, (2 * GAP + column * step[0], top + GAP + row * step[1]))
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(file)


def draw_tile(seen: Seen, title: str) -> Image.Image:
    """One row: the image with its crop, the sample, the caption and the record; sizes are height x width."""
    tile = Image.new("RGB", TILE, PAPER)
    draw = ImageDraw.Draw(tile)
    for left, picture in ((0, _cropped(seen)), (BOX + GAP, _sample(seen))):
        corner = (left + (BOX - picture.width) // 2, (BOX - picture.height) // 2)
        tile.paste(picture, corner)
        draw.rectangle(
            (corner[0], corner[1], corner[0] + picture.width - 1, corner[1] + picture.height - 1), outline=FAINT
        )
    if is_mirrored(seen.control):
        draw.rectangle((BOX + GAP, 0, BOX + GAP + 42, LINE), fill=FLIP)
        draw.text((BOX + GAP + 4, 1), "flipped", "white", _font(SMALL))
    y = BOX + GAP // 2
    for line in _wrapped(title, _font(TEXT), TILE[0], CAPTION_LINES):
        draw.text((0, y), line, INK, _font(TEXT))
        y += LINE
    original, crop, sample = cut_lines(seen.control)
    for line in (f"{original}, {sample}", crop):
        draw.text((0, y), line, FAINT, _font(SMALL))
        y += LINE
    return tile


def _cropped(seen: Seen) -> Image.Image:
    """The image, dimmed outside the crop, with a frame around the crop."""
    image = _fitted(seen.image)
    left, top, right, bottom = crop_box(seen.control)
    box = (
        round(left * image.width),
        round(top * image.height),
        max(1, round(right * image.width)) - 1,
        max(1, round(bottom * image.height)) - 1,
    )
    kept = Image.new("L", image.size, 0)
    ImageDraw.Draw(kept).rectangle(box, fill=255)
    dimmed = Image.blend(image, Image.new("RGB", image.size, "#808080"), DIMMED)
    image = Image.composite(image, dimmed, kept)
    ImageDraw.Draw(image).rectangle(box, outline=CROP, width=2)
    return image


def _sample(seen: Seen) -> Image.Image:
    return _fitted(to_pil_image(seen.pixels))


def _fitted(image: Image.Image) -> Image.Image:
    """An image scaled to the box; enlarged pixels stay visible."""
    scale = BOX / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """A text in lines of a width, pixels; what does not fit is replaced by an ellipsis."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        elif len(wrapped) < lines:
            wrapped.append(word)
        else:
            wrapped[-1] += " …"
            break
    return [_shortened(line, font, width) for line in wrapped if line]


def _shortened(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(line) > width:
        line = f"{line.removesuffix('…')[:-1]}…"
    return line
