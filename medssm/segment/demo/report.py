"""The demo's report: one HTML file that needs no other, with the figures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from medssm.files import write_bytes

# metric: its name, what it means, digits, whether it lies between 0 and 1 with 1 the best
_METRICS = {
    "dice": ("Dice", "overlap, 1 is best", 3, True),
    "hd95": ("HD95", "95th percentile of the distance between the surfaces in mm, 0 is best", 1, False),
    "nsd": ("Surface Dice", "share of the surfaces within {nsd_mm:g} mm of each other, 1 is best", 3, True),
}
_STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5c6b7a; --line: #dfe5eb; --bar: #cfe3f5; --accent: #0b63a5; --paper: #f4f6f8; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); margin: 0;
       background: var(--paper); }
main { max-width: 1020px; margin: 0 auto; padding: 2.5rem 2rem 3rem; background: white; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { max-width: 75ch; }
.lead { font-size: 1.08rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.notice { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .7rem 1rem; max-width: none; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1.4rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
caption span { font-weight: 400; color: var(--soft); }
th, td { padding: .38rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
.scores { table-layout: fixed; }
.scores thead th:first-child { width: 9.5rem; }
.scores td:last-child, .scores thead th:last-child { border-left: 1px solid var(--line); }
td.bar { background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)); }
td.best { font-weight: 700; color: var(--accent); }
.pairs th, .pairs td { text-align: left; white-space: normal; vertical-align: top; }
.pairs th { width: 11rem; color: var(--soft); }
figure { margin: 1rem 0 1.6rem; }
img { max-width: 100%; display: block; margin: 0 auto .4rem; border-radius: 4px; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; font-size: .82rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { background: white; } main { padding: 0; } }
"""


def write_report(path: Path, metrics: Mapping, figures: Mapping[str, Path]) -> None:
    """`metrics` is what metrics.json holds (see `pipeline.structures`); `figures` names the PNG files found, overlays, split, dice and curves."""
    write_bytes(path, _page(metrics, {name: _inline(file) for name, file in figures.items()}).encode())


def _page(metrics: Mapping, image: Mapping[str, str]) -> str:
    ours, monai, mirrored, look_up = ({row["key"]: row for row in metrics["rows"]}[key] for key in ("ours", "monai", "mirrored", "look_up"))
    name, trained, tested = escape(ours["title"]), metrics["split"]["trained"], metrics["split"]["tested"]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>medssm demo: structures of a brain MRI</title><style>{_STYLE}</style></head><body><main>
<h1>Brain structures, learned on one side and found on the other</h1>
<p class="soft">medssm {escape(metrics["version"])} · {escape(metrics["data"]["title"])} · seed {metrics["seed"]}</p>
<p class="lead">{name} reaches a mean Dice of <b>{_mean(ours)}</b> on the {tested} hemisphere after {ours["seconds"]:.0f} seconds of
training on the {trained} one; a MONAI convolutional U-Net of like size gets {_mean(monai)} in the same time. The {trained} side's
labels, mirrored, get {_mean(mirrored)}, and intensity alone {_mean(look_up)}.</p>
<figure><img alt="What {name} found, in three views" src="{image["found"]}"><figcaption>What {name} found on the {tested} side, which it was
never trained on.</figcaption></figure>
<p class="notice"><b>What this shows, and what not.</b> It is one volume, and its hemispheres are similar: this shows that the pipeline
works from a file to a label map, not how accurate it is. Nothing here says how well any of these networks does on another person, scanner or
disease. Each was trained once, for minutes; a difference of a few hundredths between them may be chance.</p>

<h2>Results on the {tested} side</h2>
{_scores(metrics)}
<figure><img alt="Dice of every class and row" src="{image["dice"]}"></figure>
{_pairs({row["title"]: _about(row) for row in metrics["rows"]})}

<h2>What was found</h2>
<figure><img alt="Label maps in three views" src="{image["overlays"]}"><figcaption>The {tested} side, never trained on. First row: the
labels as drawn. Below, in colour, what was found, with the drawn outlines in white.</figcaption></figure>
<figure><img alt="The side trained on and the side tested on" src="{image["split"]}"><figcaption>The {trained} side with the labels that
were trained on, the {metrics["split"]["gap_mm"]:g} mm about the midline that belong to neither side, and the {tested} side with what
{name} found.</figcaption></figure>

<h2>How</h2>
{_pairs(_method(metrics))}
<figure><img alt="Learning curves" src="{image["curves"]}"><figcaption>Training loss. Both networks see patches of the same kind, as many
as they can in {metrics["recipe"]["max_seconds"]:g} seconds. The {tested} side is not looked at before the end.</figcaption></figure>

<h2>Machine and versions</h2>
{_pairs(metrics["machine"])}

<h2>Again</h2>
<p>The whole demo:</p>
<pre>{escape(metrics["commands"][0])}</pre>
<p>What it is made of, run in this report's folder. The same commands take your data: put it where the demo put its own.</p>
<pre>{escape(chr(10).join(metrics["commands"][1:]))}</pre>
<p class="soft">A budget in seconds buys a different number of steps on another machine, or on this one at another time, so the numbers
move a little from run to run. In this folder: metrics.json (all numbers), labels.nii.gz ({name}'s label map on the brain's own grid),
data (the two sides), networks (weights and config), predictions (the label map of each row).</p>
</main></body></html>
"""


def _about(row: Mapping) -> str:
    return row["about"] + (f" {row['predict_seconds']:.1f} seconds to segment the tested side." if "predict_seconds" in row else "")


def _scores(metrics: Mapping) -> str:
    """A table for each metric: rows by classes, the best of each class in bold, a bar behind what lies between 0 and 1."""
    columns, tables = [*metrics["classes"], "mean"], []
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *columns))
    for metric, (name, meaning, digits, share) in _METRICS.items():
        values = [[round(row[metric][column], digits) for column in columns] for row in metrics["rows"]]
        best = [(max if share else min)(column) for column in zip(*values, strict=True)]
        cells = ["".join(_cell(value, top, digits, share) for value, top in zip(line, best, strict=True)) for line in values]
        body = "".join(f"<tr><th>{escape(row['title'])}</th>{line}</tr>" for row, line in zip(metrics["rows"], cells, strict=True))
        tables.append(
            f'<table class="scores"><caption>{name} <span>{meaning.format(**metrics)}</span></caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    return "\n".join(tables)


def _cell(value: float, best: float, digits: int, share: bool) -> str:
    classes = f"{'bar ' if share else ''}{'best' if value == best else ''}".strip()
    return f'<td class="{classes}" style="--part: {100 * value if share else 0:.0f}%">{value:.{digits}f}</td>'


def _method(metrics: Mapping) -> dict[str, str]:
    recipe, trained, tested = metrics["recipe"], metrics["split"]["trained"], metrics["split"]["tested"]
    rates = " and ".join(f"{row['lr']:g} for {row['title']}" for row in metrics["rows"] if "steps" in row)
    edges, patch = (" x ".join(f"{value:g}" for value in recipe[name]) for name in ("spacing", "patch"))
    return {
        "Data": f"{metrics['data']['credit']} Cropped to the brain; the two sides of a structure are one class.",
        "Split": f"Trained on the {trained} hemisphere, tested on the {tested} one. The {metrics['split']['gap_mm']:g} mm about the "
        "midline (x = 0) belong to neither, and each side is a file of its own: no window or patch reaches across.",
        "Left and right": "One hemisphere has one handedness. So half of the training patches, drawn at random, are mirrored left to "
        "right, for all networks alike. The tested side is segmented as it is, never flipped.",
        "Recipe": f"For each network: {recipe['max_seconds']:g} seconds of training steps, {recipe['batch']} patches of {patch} "
        f"voxels at {edges} mm in a step, {recipe['foreground']:.0%} of them centred on a structure; rotation, zoom, noise, "
        "blur, contrast and low resolution on some; Dice and cross-entropy; AdamW, the learning rate down a cosine from "
        f"{rates}. Windows in prediction overlap by "
        f"{metrics['overlap']:.3g} of their edge. All this was chosen with the sides exchanged: trained on the left one, "
        "tested on the right one.",
        "Metrics": "By medssm evaluate, in millimetres. A class of which nothing was found has an HD95 of the image's diagonal.",
    }


def _pairs(table: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in table.items())
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _mean(row: Mapping) -> str:
    return f"{row['dice']['mean']:.3f}"


def _inline(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
