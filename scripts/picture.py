"""Makes the README's picture, docs/report.png: the head of the demo's report, by Chromium.

    onebyone demo
    python scripts/picture.py runs/demo/small docs/report.png

Needs Chromium and Playwright's Python package, which the extra `dev` brings.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1280
COLORS = 64  # few colors are enough for text and bars, and keep the file small
# Chromium opens no connection of its own.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--until", default="network", help="id of the section where it ends")
    parser.add_argument("--hide", default="measured", help="id of a section to leave out")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        page.goto((args.run / "report.html").resolve().as_uri())
        page.add_style_tag(content=f"#{args.hide} {{ display: none }}")
        end = page.locator(f"#{args.until}").bounding_box()
        box = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"]}
        taken = page.screenshot(clip=box, full_page=True)
        browser.close()
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {picture.width}×{picture.height}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
