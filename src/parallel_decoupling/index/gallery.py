"""Hits as one HTML file without references to others: pictures, scores, a bar per path.

Here: the page. Elsewhere on purpose: finding the hits (``searcher``), the table in the terminal
(``commands.search``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from parallel_decoupling.data.images import ImageError, load_image
from parallel_decoupling.index.protocol import Hit

IMAGE_FIELD = "image"
THUMBNAIL_SIDE = 240
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #f6f6f4; margin: 2rem auto;
       max-width: 1160px; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; }
header { display: flex; gap: 1.2rem; align-items: center; margin-bottom: 1.5rem; }
header img { max-height: 120px; border-radius: 6px; }
header p { margin: .3rem 0 0; color: #666; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1rem; }
article { background: white; border: 1px solid #ddd; border-radius: 8px; padding: .8rem;
          overflow-wrap: anywhere; }
article img, .nothing { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eee;
                        border-radius: 4px; image-rendering: auto; }
.nothing { display: flex; align-items: center; justify-content: center; color: #777; font-size: .8rem;
           text-align: center; }
h2 { font-size: 1rem; margin: .5rem 0 .3rem; display: flex; justify-content: space-between; }
.bar { display: grid; grid-template-columns: 5em 1fr 3.4em; gap: .4em; align-items: center;
       font-size: .78rem; font-variant-numeric: tabular-nums; }
.bar span { background: #eee; height: .65em; border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.bar b, .bar em { text-align: right; font-style: normal; }
dl { margin: .5rem 0 0; font-size: .8rem; color: #444; }
dt { float: left; clear: left; margin-right: .4em; color: #888; }
dd { margin: 0; }
"""


def gallery_html(
    hits: Sequence[Hit],
    *,
    text: str | None = None,
    image: Image.Image | str | None = None,
    scoring: str = "aggregate",
    image_dir: str | Path = ".",
) -> str:
    """Write the page of one query.

    Args:
        hits: best first; the field ``image`` names the picture.
        text: of the query.
        image: of the query.
        scoring: named on the page.
        image_dir: where pictures with relative names are.

    Returns:
        HTML with the pictures as data URIs of at most 240 pixels a side. A hit whose picture cannot be
        read says so.
    """
    best = {
        name: max(hit.similarities[name] for hit in hits) for name in (hits[0].similarities if hits else ())
    }
    cards = "\n".join(_card(rank, hit, best, Path(image_dir)) for rank, hit in enumerate(hits, start=1))
    title = escape(text or "search by image")
    picture = "" if image is None else _picture(image)
    count = f"{len(hits)} hit{'' if len(hits) == 1 else 's'} by {escape(scoring)}"
    note = f"{count}; bars are cosines on each path, 0 to 1; bold marks the path's best among these hits"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n<header>{picture}<div><h1>{title}</h1><p>{note}</p></div>"
        f"</header>\n<main>\n{cards}\n</main>\n</body>\n</html>\n"
    )


def _card(rank: int, hit: Hit, best: Mapping[str, float], image_dir: Path) -> str:
    name = hit.fields.get(IMAGE_FIELD)
    picture = _picture(str(image_dir / name)) if isinstance(name, str) and name else ""
    bars = "".join(
        _bar(path, number, value, value >= best[path])
        for number, (path, value) in enumerate(hit.similarities.items())
    )
    fields = "".join(_field(key, value) for key, value in hit.fields.items() if value is not None)
    return (
        f"<article>{picture}<h2><span>#{rank}</span><span>{hit.score:.3f}</span></h2>{bars}"
        f"<dl>{_field('id', hit.id)}{fields}</dl></article>"
    )


def bar_html(number: int, value: float) -> str:
    """The bar of path ``number``: ``value`` from 0 to 1, in the path's colour."""
    width = f"{100 * min(max(value, 0.0), 1.0):.1f}%"
    return f'<span><i style="width:{width};background:{_COLOURS[number % len(_COLOURS)]}"></i></span>'


def _bar(path: str, number: int, value: float, is_best: bool) -> str:
    tag = "b" if is_best else "em"
    return f'<div class="bar">{escape(path)}{bar_html(number, value)}<{tag}>{value:.3f}</{tag}></div>'


def _field(key: str, value: Any) -> str:
    return f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>"


def _picture(image: Image.Image | str) -> str:
    try:
        picture = load_image(image)
    except ImageError as error:
        return f'<div class="nothing">{escape(str(error))}</div>'
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    code = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/jpeg;base64,{code}">'
