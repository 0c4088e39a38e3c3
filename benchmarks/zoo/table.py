"""The table of results by kind of network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ssprop_patch._text import markdown as markdown_table

KINDS = {
    "ResNet-like": """resnet resnetv2 resnest res2net senet sknet nfnet byobnet byoanet regnet
        tresnet selecsls dla hrnet hgnet dpn densenet rdnet vovnet cspnet cspnext xception
        xception_aligned""",
    "VGG, Inception, NAS": """vgg inception_v3 inception_v4 inception_resnet_v2 nasnet pnasnet
        convmixer""",
    "EfficientNet, MobileNet": """efficientnet mobilenetv3 mobilenetv5 ghostnet repghost repvit
        hardcorenas rexnet lcnetv2 starnet fasternet shvit cpubone""",
    "ConvNeXt-like": """convnext inception_next mambaout focalnet metaformer edgenext csatv2
        fastvit""",
    "ViT-like": """vision_transformer vision_transformer_relpos vision_transformer_sam eva deit
        beit cait xcit volo naflexvit vitamin crossvit convit tnt pit hiera hieradet_sam2 twins
        nest mvitv2 pvt_v2 davit swin_transformer swin_transformer_v2 swin_transformer_v2_cr
        gcvit deepseek_vit qwen3_vit gemma4_vit""",
    "hybrids of both": """vision_transformer_hybrid maxxvit coat levit mobilevit efficientformer
        efficientformer_v2 efficientvit_mit efficientvit_msra efficientvim iformer lowformer
        nextvit swiftformer tiny_vit visformer""",
    "MLP-like": "mlp_mixer sequencer",
}
OF_FAMILY = {family: kind for kind, families in KINDS.items() for family in families.split()}
Row = dict[str, Any]


def kind(row: Row) -> str:
    """Return the row of the table that a network belongs to."""
    if row["library"] == "timm":
        return "timm: " + OF_FAMILY.get(row["family"], "others")
    return "torchvision: " + row["family"].replace("_", " ")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table; shares are of FLOPs, medians over the networks that were run."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(kind(row), []).append(row)
    order = [f"timm: {name}" for name in (*KINDS, "others")]
    names = sorted(groups, key=lambda n: (order.index(n) if n in order else len(order), n))
    cells = [_HEAD, *(_cells(name, groups[name]) for name in names)]
    if len(groups) > 1:
        cells.append(_cells("all", rows))
    return markdown_table(cells)


_HEAD = (
    "networks",
    "number",
    "ok",
    "no convolution",
    "other",
    "convolutions",
    "sparse",
    "of backward FLOPs",
    "of the step",
)


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    ok = sum(r["result"] == "ok" for r in rows)
    nothing = sum(r["result"] == "nothing to convert" for r in rows)
    numbers = [len(rows), ok, nothing, len(rows) - ok - nothing]
    numbers += [sum(int(r[key] or 0) for r in rows) for key in ("convolutions", "sparse")]
    shares = [[float(r[key]) for r in rows if r[key]] for key in ("backward_share", "step_share")]
    medians = [f"{100 * statistics.median(s):.1f} %" if s else "" for s in shares]
    return [name, *map(str, numbers), *medians]
