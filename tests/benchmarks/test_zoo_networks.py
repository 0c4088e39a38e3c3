"""The zoo's check on a network of each family."""

from __future__ import annotations

import pytest
import timm
import torch
from zoo import check, models, table

from .zoo_samples import entry_of

GIB = 2**30

# A small network of each family, among them every way in which a convolution is written there.
SAMPLE = {
    "timm": """
        test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet
        test_resnet test_vit test_vit_relpos cait_xxs24_224 coat_lite_tiny
        convit_tiny cpubone_nano csatv2 cspnext_tiny cs3darknet_focus_s
        dla46x_c edgenext_xx_small efficientformerv2_s0 efficientvim_m1 efficientvit_b0
        efficientvit_m0 fasternet_t0 ghostnet_050 hardcorenas_a hgnetv2_b0 iformer_t
        inception_next_atto lcnet_035 lcnetv2_small levit_128s lowformer_b0 mobilevit_xxs
        naflexvit_base_patch16_gap pit_ti_224 poolformerv2_s12 pvt_v2_b0 regnety_002
        repghostnet_050 resnest14d resnetv2_18 rexnetr_100 selecsls42 shvit_s1 skresnet18
        starnet_s050 swiftformer_xs tf_mixnet_s tiny_vit_5m_224 visformer_tiny
        vit_tiny_r_s16_p8_224 xcit_nano_12_p16_224""",
    "torchvision": """
        shufflenet_v2_x0_5 quantized_mobilenet_v2 lraspp_mobilenet_v3_large
        fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large mc3_18 raft_small""",
}
# A plain run trains these, of which no two write a convolution alike; the others are slow.
PLAIN = """
    test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet test_resnet
    test_vit test_vit_relpos coat_lite_tiny convit_tiny efficientvit_m0 ghostnet_050 levit_128s
    naflexvit_base_patch16_gap resnest14d skresnet18 tf_mixnet_s xcit_nano_12_p16_224
    shufflenet_v2_x0_5 quantized_mobilenet_v2 lraspp_mobilenet_v3_large
    fasterrcnn_mobilenet_v3_large_320_fpn raft_small"""
NOTHING = {"naflexvit_base_patch16_gap"}  # embeds its patches by a linear layer
FLOAT32 = {"raft_small"}  # makes coordinates in float32, whatever it is given


def test_the_sample_holds_over_forty_families():
    families = {entry_of(library, n).family for library in SAMPLE for n in SAMPLE[library].split()}
    assert len(families) >= 40


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=() if name in PLAIN.split() else pytest.mark.slow)
        for library in SAMPLE
        for name in SAMPLE[library].split()
    ],
)
def test_a_network_of_each_family(library, name):
    row = check.row(entry_of(library, name))
    if name in NOTHING:
        assert (row["result"], row["reason"]) == ("nothing to convert", "no convolution")
        return
    assert (row["result"], row["reason"]) == ("ok", "")
    assert row["dtype"] == ("float32" if name in FLOAT32 else "float64")
    assert row["rate0"] == "equal" and row["gradients"] == "all"
    assert 0 < row["sparse"] <= row["convolutions"] and 0 < row["dropped"] <= row["calls"]
    assert 0 < float(row["step_share"]) <= 1 and 0 < float(row["backward_share"]) <= 1
    assert torch.get_default_dtype() == torch.float32


def test_every_network_of_both_libraries_is_listed_once():
    import torchvision

    found = models.entries()
    assert len(set(found)) == len(found)
    assert {e.name for e in found if e.library == "timm"} == set(timm.list_models())
    of_torchvision = {e.name for e in found if e.library == "torchvision"}
    assert of_torchvision == set(torchvision.models.list_models())
    assert {table.kind({"library": "timm", "family": e.family}) for e in found} >= {
        "timm: ResNet-like",
        "timm: ViT-like",
    }
    unknown = {e.family for e in found if e.library == "timm"} - table.OF_FAMILY.keys()
    assert not unknown
