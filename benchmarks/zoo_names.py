"""Which architectures of others the zoo holds, how large their inputs are, and what they are told.

`zoo.py` makes them and asks whether pruning stays exact.
"""

from typing import Any

from torch import nn
from torchvision.models.video import mvit

CLASSIFICATION = (
    "alexnet", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x1_0",
    "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip
SEGMENTATION = ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large", "fcn_resnet50")
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
)  # fmt: skip
VIDEO = (
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit", "swin3d_t",
)  # fmt: skip
TIMM = (
    "test_resnet", "test_byobnet", "test_efficientnet", "test_convnext", "test_nfnet", "resnet10t",
    "resnet26d", "resnetrs50", "resnetblur50", "resnetaa50", "resnet50_gn", "resnetv2_50",
    "resnetv2_50x1_bit", "res2net50_26w_4s", "res2next50", "resnext26ts", "seresnext26t_32x4d",
    "ecaresnet26t", "seresnet18", "legacy_seresnet18", "legacy_seresnext26_32x4d", "skresnet18",
    "resnest14d", "gcresnet33ts", "gcresnext26ts", "bat_resnext26ts", "botnet26t_256",
    "eca_botnext26ts_256", "halonet26t", "sehalonet33ts", "haloregnetz_b", "lambda_resnet26t",
    "lamhalobotnet50ts_256", "cspresnet50", "cspdarknet53", "darknet53", "cs3darknet_s",
    "cs3sedarknet_l", "dpn68", "selecsls42b", "hrnet_w18_small", "dla34", "dla60_res2net",
    "vovnet39a", "ese_vovnet19b_dw", "repvgg_a0", "mobileone_s0", "gernet_s", "tresnet_m",
    "vgg11_bn", "densenet121", "densenetblur121d", "rdnet_tiny", "inception_v3", "inception_v4",
    "inception_resnet_v2", "inception_next_atto", "xception41", "legacy_xception", "nasnetalarge",
    "pnasnet5large", "mixnet_s", "ghostnet_100", "ghostnetv2_100", "ghostnetv3_100",
    "repghostnet_050", "rexnet_100", "hardcorenas_a", "tinynet_e", "lcnet_050", "lcnetv2_small",
    "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small",
    "mobilenet_edgetpu_v2_xs", "mnasnet_100", "fbnetc_100", "spnasnet_100", "semnasnet_075",
    "efficientnet_lite0", "efficientnet_es", "efficientnet_cc_b0_4e", "tf_efficientnet_b0",
    "tf_efficientnetv2_b0", "regnetx_002", "regnety_002", "regnetz_005", "regnetz_b16",
    "regnetv_040", "nfnet_l0", "dm_nfnet_f0", "eca_nfnet_l0", "convnext_atto", "convnextv2_atto",
    "convnext_zepto_rms", "convmixer_768_32", "convformer_s18", "poolformer_s12", "starnet_s1",
    "fasternet_t0", "shvit_s1", "mambaout_femto", "hgnet_tiny", "hgnetv2_b0", "repvit_m0_9",
    "fastvit_t8", "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0",
    "efficientvit_m0", "efficientformerv2_s0", "swiftformer_xs", "levit_conv_128s",
    "visformer_tiny", "focalnet_tiny_srf", "coatnet_nano_rw_224", "caformer_s18",
    "cait_xxs24_224", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
)  # fmt: skip
# One of every file of timm's models that the list above has nothing of: the one with the fewest
# parameters, or of the file with the smallest such, made small by `OPTIONS`.
FAMILIES = (
    "beit_base_patch16_224", "coat_tiny", "convit_tiny", "cpubone_nano", "crossvit_tiny_240",
    "csatv2", "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224",
    "efficientformer_l1", "efficientvim_m1", "eva02_tiny_patch14_224", "gcvit_xxtiny",
    "gemma4_vit_167m", "hiera_tiny_224", "sam2_hiera_tiny", "iformer_t", "lowformer_b0",
    "mobilenetv5_base", "mvitv2_tiny", "naflexvit_so150m2_patch16_reg1_gap", "nest_tiny",
    "nextvit_small", "pit_ti_224", "pvt_v2_b0", "qwen3_vit_88m", "sequencer2d_s",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_patch16_224",
    "twins_svt_small", "twins_pcpvt_small", "vit_tiny_r_s16_p8_224", "test_vit_relpos",
    "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p8_224",
)  # fmt: skip
# Built for images of this height and width, so that a sweep takes minutes.
_BUILT_FOR = {
    "beit_base_patch16_224": 112, "convit_tiny": 112, "crossvit_tiny_240": 120,
    "deepseek_vit_412m": 112, "deit_tiny_patch16_224": 112, "eva02_tiny_patch14_224": 112,
    "gcvit_xxtiny": 128, "hiera_tiny_224": 128, "mvitv2_tiny": 128, "nest_tiny": 112,
    "pit_ti_224": 112, "samvit_base_patch16_224": 112, "sequencer2d_s": 112,
    "swinv2_cr_tiny_224": 128, "swinv2_tiny_window8_256": 128, "tnt_s_patch16_224": 112,
    "twins_pcpvt_small": 128, "twins_svt_small": 128, "vitamin_small_224": 112,
    "volo_d1_224": 112, "xcit_nano_12_p8_224": 112,
}  # fmt: skip
N_PIXELS = {
    **_BUILT_FOR,
    "alexnet": 224, "vgg16_bn": 224, "vgg11_bn": 224, "inception_v3": 128,
    "vit_b_16": 224, "swin_t": 224, "maxvit_t": 224,
    "halonet26t": 256, "sehalonet33ts": 256, "haloregnetz_b": 224, "lambda_resnet26t": 256,
    "lamhalobotnet50ts_256": 256, "bat_resnext26ts": 256,
    "csatv2": 128, "sam2_hiera_tiny": 128, "test_vit_relpos": 160,
    "naflexvit_so150m2_patch16_reg1_gap": 96,
    "gemma4_vit_167m": 96, "qwen3_vit_88m": 96, "cpubone_nano": 128,
    "r3d_18": 32, "mc3_18": 32, "r2plus1d_18": 32, "s3d": 224, "mvit": 64,
    "swin3d_t": 64,
}  # fmt: skip
VIDEO_FRAMES = dict.fromkeys(VIDEO, 8) | {"s3d": 16}
_SMALL_IMAGES = {
    "min_size": 128, "max_size": 160, "box_score_thresh": 0.0, "box_detections_per_img": 20,
}  # fmt: skip
_NO_AUXILIARY = {"init_weights": False, "aux_logits": False}  # as with trained weights
_THREE_BLOCKS = {"depth": 3, "embed_dim": 192, "num_heads": 3}
_THREE_OF_MANY = ("beit_base_patch16_224", "samvit_base_patch16_224", "deepseek_vit_412m")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"img_size": n} for name, n in _BUILT_FOR.items()},
    **{name: {"img_size": _BUILT_FOR[name], **_THREE_BLOCKS} for name in _THREE_OF_MANY},
    "gemma4_vit_167m": _THREE_BLOCKS, "qwen3_vit_88m": _THREE_BLOCKS,
    "naflexvit_so150m2_patch16_reg1_gap": _THREE_BLOCKS,
    "tiny_vit_5m_224": {"num_classes": 1000},  # else 0.58 of its parameters are 21,841 classes
    "googlenet": _NO_AUXILIARY, "inception_v3": _NO_AUXILIARY,
    **{name: _SMALL_IMAGES for name in DETECTION if "rcnn" in name},
    "ssd300_vgg16": {"score_thresh": 0.0}, "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
    "retinanet_resnet50_fpn": {"min_size": 128, "max_size": 160, "score_thresh": 0.0},
    "fcos_resnet50_fpn": {"min_size": 128, "max_size": 160, "score_thresh": 0.0},
}  # fmt: skip


def small_mvit() -> nn.Module:
    """MViTv2 as torchvision builds it, with 4 blocks for small clips; its own take 224 pixels."""
    widths = ((1, 64, 64, 1), (2, 64, 128, 2), (2, 128, 128, 1), (4, 128, 256, 2))
    blocks = [
        mvit.MSBlockConfig(
            num_heads=heads, input_channels=i, output_channels=o, kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3], stride_q=[1, s, s], stride_kv=[1, 2, 2],
        )
        for heads, i, o, s in widths
    ]  # fmt: skip
    frames, side = VIDEO_FRAMES["mvit"], N_PIXELS["mvit"]
    model: nn.Module = mvit.MViT(
        spatial_size=(side, side), temporal_size=frames, block_setting=blocks, residual_pool=True,
        residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
    )  # fmt: skip
    return model
